"""The cache ratio of one start, which keeps the plan's bytes of cache.

LMDeploy's cache is a share of what is free just then, which is not what the plan counted where
others have grown, or sleep and will take more.
"""

from __future__ import annotations

from math import ceil
from operator import add
from typing import TYPE_CHECKING, Final

from turbofit.observe.calibration import free_for_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.plan import Plan


RATIO: Final = "--cache-max-entry-count"
#: Steps in a ratio: one is 24 KiB of 24 GiB.
_STEPS: Final = 10**6


def fitted_ratio(plan: Plan, group: int, free: Mapping[str, int]) -> float:
    """The ratio that gives the cache of a group's engine its bytes; the plan's where it cannot.

    LMDeploy takes the ratio of the free memory of the fullest card in the group. Over: by less than
    a step, so that no page is lost. ``free`` are bytes by GPU UUID that are free before the engine
    starts.
    """
    group_plan, members = plan.of_group(group), plan.parallel.groups[group]
    ratio, region = group_plan.settings.cache_max_entry_count, group_plan.kv.region_bytes
    # Cards of other groups hold what their engines have by now.
    gpus = [gpu for gpu in group_plan.gpus if gpu.index in members]
    if not ratio or not region or not any(gpu.uuid in free for gpu in gpus):
        return ratio
    planned = [free_for_cache(gpu) for gpu in gpus]
    more = [free.get(gpu.uuid, gpu.free) - gpu.free for gpu in gpus]
    shared = region / ratio + min(map(add, planned, more)) - min(planned)
    steps = ceil(region / shared * _STEPS) if shared > region else _STEPS
    return steps / _STEPS if steps < _STEPS else ratio


def with_ratio(argv: tuple[str, ...], ratio: float) -> tuple[str, ...]:
    if RATIO not in argv:
        return argv
    place = argv.index(RATIO) + 1
    return (*argv[:place], f"{ratio:.6f}", *argv[place + 1 :])


def ratio_now(plan: Plan, group: int) -> float:
    """The ratio of a start on real GPUs: the plan's bytes where more is free than planned.

    Where less is free it is the plan's, so that what somebody took comes from the cache, too.
    Over: by what others give back between this look and LMDeploy's, while the engine loads.
    """
    planned = plan.of_group(group).settings.cache_max_entry_count
    return min(planned, shared_ratio(plan, group))


def shared_ratio(plan: Plan, group: int) -> float:
    """The ratio of a start beside other models of ours: the plan's bytes, whatever is free.

    Under: by a share of what others grow by within their parts of the cards while the engine loads;
    and two engines that start again at once do not know of each other.
    """
    from turbofit.launch.serve.gpu_monitor import used_now

    used = used_now(plan)
    gpus = [gpu for gpu in plan.gpus if gpu.index in used]  # the others cannot be read
    free = {gpu.uuid: gpu.total - gpu.reserved - used[gpu.index] for gpu in gpus}
    return fitted_ratio(plan, group, free)
