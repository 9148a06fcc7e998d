"""The cache ratio with which the cache gets its planned bytes in one start.

The ratio is a share of the free memory at the start. This memory may differ from the plan's, since
other processes grow, or sleep and take memory later.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.plan import Plan

#: LMDeploy's option for the share of free memory that becomes the cache.
RATIO: Final = "--cache-max-entry-count"
#: The number of steps from a ratio of 0 to 1. On a card with 24 GiB, one step is 24 KiB.
_STEPS: Final = 10**6


def fitted_ratio(plan: Plan, group: int, free: Mapping[str, int]) -> float:
    """Return the cache ratio with which a group's engine gets the planned bytes of its cache.

    LMDeploy applies the ratio to the free memory of the group's fullest card. The ratio is rounded
    up, so that no page is lost. The plan's ratio is returned if no GPU of the group is in ``free``,
    or if the cache needs a ratio of 1 or more. ``free``: free bytes by GPU UUID before the engine
    starts.
    """
    engine = plan.engines[group]
    ratio, region = engine.settings.cache_max_entry_count, engine.kv.region_bytes
    # Only this group's cards count: engines of other groups may already hold memory.
    gpus = engine.ledgers
    if not ratio or not region or not any(gpu.uuid in free for gpu in gpus):
        return ratio
    planned = [gpu.free_for_cache for gpu in gpus]
    now = [gpu.free_for_cache + free.get(gpu.uuid, gpu.free) - gpu.free for gpu in gpus]
    # The bytes to which LMDeploy will apply the ratio: the planned bytes, plus the change since.
    shared = region / ratio + min(now) - min(planned)
    steps = ceil(region / shared * _STEPS) if shared > region else _STEPS
    return steps / _STEPS if steps < _STEPS else ratio


def with_ratio(argv: tuple[str, ...], ratio: float) -> tuple[str, ...]:
    """Return a command with another cache ratio; unchanged if the command sets no ratio."""
    if RATIO not in argv:
        return argv
    place = argv.index(RATIO) + 1
    return (*argv[:place], f"{ratio:.6f}", *argv[place + 1 :])


def ratio_now(plan: Plan, group: int) -> float:
    """Return the cache ratio for a start on real GPUs: the plan's ratio, or a lower ratio.

    If more memory is free than planned, a lower ratio gives the cache its planned bytes. If less
    memory is free, the plan's ratio lets the cache shrink. The cache becomes too large if other
    processes free memory before LMDeploy sizes the cache.
    """
    planned = plan.engines[group].settings.cache_max_entry_count
    return min(planned, shared_ratio(plan, group))


def shared_ratio(plan: Plan, group: int) -> float:
    """Return the cache ratio that gives a cache its planned bytes on GPUs with other servers.

    The ratio is too low if other servers grow during loading. Engines that start at the same time
    are not considered.
    """
    from turbofit.serving.gpu_monitor import used_now

    used = used_now(plan)
    gpus = [gpu for gpu in plan.ledgers if gpu.index in used]  # GPUs that can be read
    free = {gpu.uuid: gpu.usable - used[gpu.index] for gpu in gpus}
    return fitted_ratio(plan, group, free)
