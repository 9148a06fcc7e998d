"""The cache ratio of one start, where more or less is free than the plan counted on.

LMDeploy's cache is a share of what is free just then. Beside other engines on the same cards that
is not what the plan counted: those that sleep or start again leave more free than they will need,
and an engine that starts again finds others that have grown since. The plan's bytes are kept.
"""

from __future__ import annotations

from math import ceil
from operator import add
from typing import TYPE_CHECKING, Final

from turbofit.observe.forecast import free_for_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.plan import Plan

__all__ = ["RATIO", "fitted_ratio", "with_ratio"]

#: LMDeploy's option.
RATIO: Final = "--cache-max-entry-count"
#: So many steps are in a ratio: one is 24 KiB of 24 GiB.
_STEPS: Final = 10**6


def fitted_ratio(plan: Plan, group: int, free: Mapping[str, int]) -> float:
    """The ratio that gives the cache of a group's engine its bytes; the plan's where it cannot.

    LMDeploy takes the ratio of what is free of the fullest card of the group. Over: by less than a
    step of that, so that no page of the cache is lost.

    Args:
        plan: the engine's.
        group: the engine's number in the plan.
        free: bytes by GPU UUID that are free now, before the engine starts.
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
