"""The cache ratio of one start, where more or less is free than the plan counted on.

LMDeploy's cache is a share of what is free just then. Beside other engines on the same cards that
is not what the plan counted: those that sleep or start again leave more free than they will need,
and an engine that starts again finds others that have grown since. The plan's bytes are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from operator import add
from typing import TYPE_CHECKING, Final

from turbofit.observe.forecast import free_for_cache

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from turbofit.core.plan import Plan

__all__ = ["RATIO", "SharedCards", "fitted_ratio", "ratio_now", "with_ratio"]

#: LMDeploy's option.
RATIO: Final = "--cache-max-entry-count"
#: So many steps are in a ratio: one is 24 KiB of 24 GiB.
_STEPS: Final = 10**6


def fitted_ratio(plan: Plan, group: int, free: Mapping[str, int]) -> float:
    """The ratio that gives the cache of a group's engine its bytes; the plan's where it cannot.

    LMDeploy takes the ratio of what is free of the fullest card of the group. Over: by less than a
    step of that, so that no page of the cache is lost. ``free`` are bytes by GPU UUID that are free
    now, before the engine starts.
    """
    one, members = plan.of_group(group), plan.parallel.groups[group]
    ratio, region = one.settings.cache_max_entry_count, one.kv.region_bytes
    # Cards of other groups hold what their engines have by now.
    gpus = [gpu for gpu in one.gpus if gpu.index in members]
    if not ratio or not region or not any(gpu.uuid in free for gpu in gpus):
        return ratio
    planned = [free_for_cache(gpu) for gpu in gpus]
    more = [free.get(gpu.uuid, gpu.free) - gpu.free for gpu in gpus]
    shared = region / ratio + min(map(add, planned, more)) - min(planned)
    steps = ceil(region / shared * _STEPS) if shared > region else _STEPS
    return steps / _STEPS if steps < _STEPS else ratio


def with_ratio(argv: tuple[str, ...], ratio: float) -> tuple[str, ...]:
    """A command line with another ratio."""
    if RATIO not in argv:
        return argv
    place = argv.index(RATIO) + 1
    return (*argv[:place], f"{ratio:.6f}", *argv[place + 1 :])


# Cards on which others have engines, too: what is free of them now, and the ratio for it.


def ratio_now(plan: Plan, group: int) -> float:
    """The ratio of a start on real GPUs: where more is free than planned, the plan's bytes.

    Where less is free it is the plan's, so that what somebody took comes from the cache, too.

    Over: by what others give back between this look and LMDeploy's, while the engine loads.
    """
    planned = plan.of_group(group).settings.cache_max_entry_count
    return min(planned, fitted_ratio(plan, group, _free(plan)))


@dataclass
class SharedCards:
    """Lets each start of an engine take its plan's cache, whatever the others hold just then.

    Under: the cache is smaller by a share of what others grow by, within their parts of the cards,
    while the engine loads; and two engines that start again at once do not know of each other.
    On pretend GPUs the engines share a machine through the file ``pretended``.
    """

    pretended: Path | None = None

    def file(self, plan: Plan) -> Path | None:
        """The pretend machine's file, where a plan's engines can share it.

        They can where each of them has all of its cards; others have a machine for themselves.
        """
        every = {gpu.index for gpu in plan.machine.gpus}
        whole = all(set(group) == every for group in plan.parallel.groups)
        return self.pretended if whole and not plan.engine.on_torch else None

    def ratio(self, plan: Plan, group: int) -> float:
        """The cache ratio of a start of a group's engine, now."""
        return fitted_ratio(plan, group, self._free(plan))

    def _free(self, plan: Plan) -> dict[str, int]:
        """Free bytes by GPU UUID; what cannot be read is left out."""
        if self.pretended is None:
            return _free(plan)
        file = self.file(plan)
        if file is None:
            return {}
        from turbofit.pretend.shared import read_shared

        alive = [process for process in read_shared(file).processes if process.alive]
        free = {}
        for place, gpu in enumerate(plan.gpus):
            held = sum(one.held[place] + one.context[place] + one.late[place] for one in alive)
            free[gpu.uuid] = gpu.total - gpu.reserved - gpu.used - held
        return free


def _free(plan: Plan) -> dict[str, int]:
    """Free bytes by GPU UUID, as NVML has them now; what cannot be read is left out."""
    from turbofit.launch.serve.gpu_monitor import used_now

    used = used_now(plan)
    return {
        gpu.uuid: gpu.total - gpu.reserved - used[gpu.index]
        for gpu in plan.gpus
        if gpu.index in used
    }
