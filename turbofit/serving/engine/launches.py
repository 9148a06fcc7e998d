"""The command, the environment and the port with which an engine of a plan is started."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.process.network import DEFAULT_PORT
from turbofit.serving.engine.cache_ratio import with_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.plan import Command
    from turbofit.rehearsal.pretend.clock import ClockFile
    from turbofit.serving.engine.gemm_tuning import GemmTuning
    from turbofit.serving.engine.process import Spawn

#: The variable in which `entry.py` finds the engine's API key.
KEY: Final = "TURBOFIT_ENGINE_KEY"


class StartCommand(NamedTuple):
    """The command and environment of one start of an engine.

    ``timeline`` is the file of pretend GPUs, or a folder if several processes write files; None on
    real GPUs. ``clock`` makes forwards on pretend GPUs take their forecast time.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    timeline: Path | None = None
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
        """Return the command, environment and timeline of the start with this number, from 0."""
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
