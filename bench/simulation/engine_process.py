"""A simulated engine's process, in the place of `launch.engine.process.EngineProcess`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.simulation.world import World

__all__ = ["SimulatedEngineProcess"]


class SimulatedEngineProcess:
    """What turbofit holds of an engine that it started; its log can always be opened."""

    log_error = ""

    def __init__(
        self, world: World, argv: Sequence[str], env: Mapping[str, str], log: Path, **_: object
    ) -> None:
        self.log = log
        self._world = world
        self.pid = world.new_pid()
        self._engine = world.start_engine(self.pid, argv, env)

    def poll(self) -> int | None:
        return self._engine.code

    def take(self) -> list[tuple[str, int]]:
        said = list(self._engine.said)
        self._engine.said.clear()
        return said

    def finish(self, seconds: float = 2.0) -> list[tuple[str, int]]:  # noqa: ARG002
        return self.take()

    def send(self, number: int) -> None:
        """It takes some seconds to end in order, and may hang in that."""
        engine = self._engine
        if engine.code is not None or engine.hung:
            return
        self._world.scheduler.after(0.5, lambda: engine.kill(number))

    def wait(self, seconds: float) -> None:
        scheduler = self._world.scheduler
        deadline = scheduler.now + max(0.0, seconds)
        while self._engine.code is None and scheduler.now < deadline:
            self._engine.changed.clear()
            scheduler.wait(self._engine.changed, deadline - scheduler.now)

    def strike(self) -> None:
        self._engine.kill()

    def kill(self, seconds: float) -> bool:  # noqa: ARG002
        self._engine.kill()
        return True
