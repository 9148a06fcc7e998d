"""Cards on which others have engines, too: what is free of them now, and the cache ratio for it.

Others are further models of this turbofit, or other turbofits, whose reservations a plan counts as
used. What they have yet to take is free when LMDeploy sizes a cache, and its ratio would take a
share of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.launch.engine.fitted_cache import fitted_ratio

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.plan import Plan

__all__ = ["SharedCards", "ratio_now"]


def ratio_now(plan: Plan, group: int) -> float:
    """The ratio of a start on real GPUs: where more is free than planned, the plan's bytes.

    Where less is free it is the plan's, so that what somebody took comes from the cache, too.

    Over: by what others give back between this look and LMDeploy's, while the engine loads.

    Args:
        plan: the engine's.
        group: the engine's number in the plan.
    """
    planned = plan.of_group(group).settings.cache_max_entry_count
    return min(planned, fitted_ratio(plan, group, _free(plan)))


class SharedCards:
    """Lets each start of an engine take its plan's cache, whatever the others hold just then.

    Under: the cache is smaller by a share of what others grow by, within their parts of the cards,
    while the engine loads; and two engines that start again at once do not know of each other.

    Args:
        file: through which the engines share a pretend machine; None on real GPUs.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file

    def file(self, plan: Plan) -> Path | None:
        """The pretend machine's file, where a plan's engines can share it.

        They can where each of them has all of its cards; others have a machine for themselves.
        """
        every = {gpu.index for gpu in plan.machine.gpus}
        whole = all(set(group) == every for group in plan.parallel.groups)
        return self._file if whole and not plan.engine.on_torch else None

    def ratio(self, plan: Plan, group: int) -> float:
        """The cache ratio of a start of a group's engine, now."""
        return fitted_ratio(plan, group, self._free(plan))

    def _free(self, plan: Plan) -> dict[str, int]:
        """Free bytes by GPU UUID; what cannot be read is left out."""
        if self._file is None:
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
