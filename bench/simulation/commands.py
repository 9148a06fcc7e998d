"""Commands of turbofit in a simulated day: `serve`, and what runs as it does."""

from __future__ import annotations

import signal
from functools import cache
from typing import TYPE_CHECKING, Any

from turbofit.core.errors import TurbofitError

if TYPE_CHECKING:
    from bench.simulation.scenario import Day
    from bench.simulation.scheduler import Process

__all__ = ["Turbofit", "serve_question"]


class Turbofit:
    """One `turbofit serve`, as a service manager keeps it.

    Subclasses provide: ``_command``, where it is another command.

    Args:
        day: where it runs.
        model: what it serves.
        fixed: what its user set.
        primary: whether clients ask it.
    """

    def __init__(
        self, day: Day, model: str, fixed: dict[str, Any], *, primary: bool = True
    ) -> None:
        self._day, self._model, self._fixed = day, model, fixed
        self._primary = primary
        self._stop: Any = None
        self._main: Any = None
        self.process: Process | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        self.process = self._day.world.turbofit(self._run, primary=self._primary)
        self._main = self.process.threads[0]
        if self._primary:
            self.process.ends.append(self._day.ended)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self._day.world.kill(self.process)

    def signal(self, number: signal.Signals) -> None:
        """As `kill` sends it."""
        from turbofit.launch.serve.supervisor import StoppedError

        world, process = self._day.world, self.process
        if process is None or not process.alive or self._stop is None:
            return
        world.trace(f"{number.name} to turbofit {process.pid}")
        before, world.scheduler.process = world.scheduler.process, process
        try:
            self._stop._caught(number, None)
        except StoppedError as exc:
            world.scheduler.throw(self._main, process, exc)
        finally:
            world.scheduler.process = before
        world.stir(process)

    def _run(self) -> int:
        from turbofit.cli.terminal.interrupt import exit_code
        from turbofit.launch.serve.supervisor import StoppedError, StopSignal

        self._stop = StopSignal()
        try:
            ended = self._command(self._stop)
        except StoppedError as exc:
            ended = exc.signal
        except TurbofitError as exc:
            self._failed(exc)
            return int(exc.exit_code)
        return exit_code(ended)

    def _command(self, stop: Any) -> Any:
        """What it runs; the signal that ended it, None where it ended by itself."""
        from turbofit.cli.commands import serve
        from turbofit.launch.serve.leases import Leases

        arguments, config = serve_question(self._model, tuple(self._fixed.items()), "m")
        with Leases() as leases:
            return serve._launch(arguments, config, stop, leases, as_json=False)

    def _failed(self, error: TurbofitError) -> None:
        world = self._day.world
        world.trace(f"error: {error.message} | {error.hint}")
        if not error.hint:
            world.violate(f"an error without a hint: {error.message}")


@cache
def serve_question(
    model: str, fixed: tuple[tuple[str, Any], ...], name: str | None = None
) -> tuple[Any, Any]:
    """The command line of `serve`; ``name`` is what clients call the model."""
    from turbofit.cli.options.launch_options import ServeOptions
    from turbofit.cli.serving.serve_plan import ServeArguments
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.engine.supervised_engine import Timing
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.passthrough import sort_options
    from turbofit.planning.request import PlanRequest

    request = PlanRequest(model=model, **dict(fixed))
    options = ServeOptions(no_rehearse=True)
    config = ServeConfig.of(
        request=request,
        # Who asks again and again does so less often than in use: a day has 86,400 seconds.
        gateway=GatewayConfig(idle_seconds=5400.0, retry_seconds=30.0),
        timing=Timing(liveness=1800.0, start=1800.0),
        access_log="none",
        rehearse=False,
        model_name=name,
    )
    return ServeArguments(request, options, sort_options((), unplanned=False)), config
