"""The command, environment, port and cache ratio with which an engine of a plan is started.

The ratio is a share of the free memory at the start. This memory may differ from the plan's, since
other processes grow, or sleep and take memory later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from math import ceil
from pathlib import Path
from typing import Final, NamedTuple

from turbofit.core.plan import Command, Plan
from turbofit.core.process.network import DEFAULT_PORT
from turbofit.rehearsal.pretend.clock import ClockFile
from turbofit.serving.engine.gemm_tuning import GemmTuning
from turbofit.serving.engine.process import Spawn

#: The variable in which `entry.py` finds the engine's API key.
KEY: Final = "TURBOFIT_ENGINE_KEY"
#: LMDeploy's option for the share of free memory that becomes the cache.
RATIO: Final = "--cache-max-entry-count"
#: The number of steps from a ratio of 0 to 1. On a card with 24 GiB, one step is 24 KiB.
_RATIO_STEPS: Final = 10**6


class StartCommand(NamedTuple):
    """The command and environment of one start of an engine.

    ``machine`` is the folder of the pretend machine, None on real GPUs. ``clock`` makes forwards on
    pretend GPUs take their forecast time.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    machine: Path | None = None
    clock: ClockFile | None = None


@dataclass
class Launch:
    """An engine on real GPUs, which can be started again and again.

    ``group`` is the engine's place in the plan. ``runner`` are the words that start LMDeploy, in
    place of the command's first word. If the command does not contain the API key ``key``, the
    engine's environment does. ``ratio`` returns the cache ratio of a start; None keeps the
    command's ratio. ``images`` are variables for the preparation of images. ``spawn`` starts the
    process; None means `process.child.child`. ``tuning`` keeps the GEMM tuning; None keeps nothing.
    """

    command: Command
    runner: Sequence[str]
    key: str | None = None
    _: KW_ONLY
    group: int = 0
    ratio: Callable[[], float] | None = None
    spawn: Spawn | None = None
    images: Mapping[str, str] | None = None
    tuning: GemmTuning | None = None

    @property
    def port(self) -> int:
        return port_of(self.command)

    def start_command(self, number: int) -> StartCommand:  # noqa: ARG002 - a pretend launch needs it
        """Return the command and environment of the start with this number, from 0."""
        return StartCommand(self.argv(), self.environment({**os.environ, **self.command.env}))

    def argv(self) -> tuple[str, ...]:
        words = tuple(self.command.argv[1:])
        return (*self.runner, *(words if self.ratio is None else with_ratio(words, self.ratio())))

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return ``base`` with the engine's variables, and its API key if the command has none.

        RAY_ADDRESS is "local" if ``base`` does not set it. Without the variable, ranks of the
        PyTorch engine would join a Ray cluster of this host, and take GPUs outside the plan.
        """
        tuned = {} if self.tuning is None else self.tuning.environment()
        env = {"RAY_ADDRESS": "local", **base, **(self.images or {}), **tuned}
        env |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        if self.key is None or self.key in self.command.argv:
            return env
        return {**env, KEY: self.key}


def port_of(command: Command) -> int:
    """Return the port in an engine's command."""
    argv = command.argv
    for option in ("--server-port", "--port"):  # of LMDeploy, of the fallback engine
        if option in argv:
            return int(argv[argv.index(option) + 1])
    return DEFAULT_PORT


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
    steps = ceil(region / shared * _RATIO_STEPS) if shared > region else _RATIO_STEPS
    return steps / _RATIO_STEPS if steps < _RATIO_STEPS else ratio


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
