"""The pretend machine of a PyTorch engine's launch: several processes share one account."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.launch.engine.pretend_usage import PretendUsage
from turbofit.observe.ends import End

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from turbofit.core.plan import Plan
    from turbofit.pretend.scenario import Scenario

__all__ = ["torch_death", "torch_environment", "torch_seen"]


def torch_environment(
    plan: Plan, machine: Scenario, folder: Path, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment in which LMDeploy's own server finds the pretend cards.

    Args:
        plan: what is launched.
        machine: what it is launched on.
        folder: a new one, for the machine's files.
        base: the environment to start from.

    Raises:
        PackageError: torch is no CUDA build.
    """
    from turbofit.pretend.environment import cuda_site, find_turbofit, put_first
    from turbofit.pretend.run import prepare
    from turbofit.rehearse.packages import SERVED, STAND_IN, need_packages

    need_packages(plan.engine.name, ray=plan.settings.tp > 1)
    path = dict(base)
    if plan.engine.of_lmdeploy:
        put_first(path, "PYTHONPATH", str(SERVED))
        find_turbofit(path)
    made = prepare(machine, folder, path, site=cuda_site())
    env = {**made.env, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if plan.settings.draft is not None:
        put_first(env, "PYTHONPATH", str(STAND_IN))
    return env


def torch_death(plan: Plan, group: int, folder: Path) -> End | None:
    """The last refused allocation, as `pretend_death` tells it."""
    from turbofit.pretend.run import machine_files
    from turbofit.pretend.shared import read_shared

    try:
        files = machine_files(folder)
        usages = {usage.pid: usage for usage in files.usages() if usage.refused}
        processes = [p for p in read_shared(files.shared).processes if p.pid in usages]
    except (OSError, ValueError, LookupError):
        return None
    if not processes:
        return None
    last = usages[max(processes, key=lambda one: one.refused_at).pid].refused[-1]
    return End(
        kind="out_of_memory",
        gpu=plan.parallel.groups[group][last.device],
        phase=last.phase,
        where=(last.site or "").partition(" < ")[0],
        asked=last.requested,
        left=last.left,
        missing=None if last.simulated else last.short,
        simulated=last.simulated,
    )


def torch_seen(group: Sequence[int], machine: Scenario, folder: Path) -> tuple[PretendUsage, ...]:
    """What each of a group's pretend GPUs held so far; empty where it cannot be read."""
    from turbofit.pretend.run import machine_files
    from turbofit.pretend.shared import read_shared

    try:
        shared = read_shared(machine_files(folder).shared)
    except (OSError, ValueError):
        return ()
    seen = []
    for place, index in enumerate(group):
        card = machine.gpus[place]
        others = card.used + card.late
        held = sum(size for _, size in shared.holders(place))
        seen.append(
            PretendUsage(
                gpu=index, peak=others + shared.peak[place], held=others + held, pool=None,
                free_at_cache=None, region=None,
            )
        )  # fmt: skip
    return tuple(seen)
