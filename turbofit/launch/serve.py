"""Launches the engines of a plan, follows them to readiness and to their end."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.launch.command import DEFAULT_PORT
from turbofit.launch.endings import ending, fallback, hang
from turbofit.launch.environment import check_port
from turbofit.launch.phases import Watch
from turbofit.launch.probe import Probe
from turbofit.launch.process import EngineProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from turbofit.core.plan import Command, Plan

__all__ = ["HOST", "Server"]

#: Engines listen here only: their management routes are open to whoever reaches them.
HOST: Final = "127.0.0.1"

_TICK: Final = 0.1
#: uvicorn waits for open streams without limit; a second signal ends the wait.
_DRAIN_SECONDS: Final = 30.0
_START_SECONDS: Final = 2 * 3600.0


class _Engine:
    """One engine: its process, what its log said, whether it is ready."""

    def __init__(self, process: EngineProcess, watch: Watch, probe: Probe, name: str) -> None:
        self.process, self.watch, self.probe, self.name = process, watch, probe, name


class Server:
    """All engines of one plan.

    Args:
        plan: what to launch; it must fit.
        commands: one a group, with whatever the user added.
        runner: the words that start LMDeploy, in place of each command's first.
        folder: where the logs go.
        say: takes lines of progress.
        key: the API key of the engines, where they have one.
        check: whether a worst-case image request must be answered before it counts as ready.
    """

    def __init__(
        self,
        plan: Plan,
        commands: Sequence[Command],
        runner: Sequence[str],
        folder: Path,
        say: Callable[[str], None],
        *,
        key: str | None = None,
        check: bool = True,
    ) -> None:
        self._plan, self._commands, self._runner = plan, commands, tuple(runner)
        self._folder, self._say, self._key, self._check = folder, say, key, check
        self._engines: list[_Engine] = []
        self._signal: signal.Signals | None = None
        self._began = 0.0

    def run(self, on_ready: Callable[[list[str]], None]) -> signal.Signals:
        """Launch, wait until ready, follow to the end. Call it in the main thread.

        Args:
            on_ready: called once with the engines' addresses.

        Returns:
            The signal that ended it.

        Raises:
            LaunchError: an engine could not be started or ended by itself.
            OutOfMemoryError: an engine ran out of memory.
            DoesNotFitError: an engine hangs in its warm-up.
        """
        self._began = time.monotonic()
        for command in self._commands:
            check_port(HOST, _port(command))
        # A signal that our parent had ignored (nohup) stays ignored.
        heard = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._caught) for number in heard}
        try:
            self._start()
            return self._follow(on_ready)
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _caught(self, number: int, _frame: Any) -> None:
        """The first signal drains, the second one stops at once."""
        if self._signal is not None:
            for engine in self._engines:
                engine.process.strike()
        self._signal = signal.Signals(number)

    def _start(self) -> None:
        many = len(self._commands) > 1
        for command in self._commands:
            name = f"engine {command.group}" if many else "engine"
            log = self._folder / f"engine-{command.group}.log"
            process = EngineProcess((*self._runner, *command.argv[1:]), _environment(command), log)
            probe = Probe(self._plan, HOST, _port(command), self._key, check=self._check)
            engine = _Engine(process, Watch(self._plan), probe, name)
            self._engines.append(engine)
            self._tell(engine, f"phase: starting (process {process.pid}, log {log})")
            probe.start()

    def _follow(self, on_ready: Callable[[list[str]], None]) -> signal.Signals:
        ready = False
        while self._signal is None:
            for engine in self._engines:
                self._look(engine)
            if not ready and all(engine.watch.phase == "ready" for engine in self._engines):
                ready = True
                on_ready([f"http://{HOST}:{_port(command)}" for command in self._commands])
            if not ready and time.monotonic() - self._began > _START_SECONDS:
                raise LaunchError(
                    f"the engine was not ready after {_START_SECONDS / 3600:.0f} hours",
                    hint=f"see its log in {self._folder}",
                )
            time.sleep(_TICK)
        return self._signal

    def _look(self, engine: _Engine) -> None:
        """Read on, and raise what ends the run."""
        code = engine.process.poll()
        now = time.monotonic()
        for text, count in engine.process.take() if code is None else engine.process.finish():
            for line in engine.watch.see(text, count, now):
                self._tell(engine, line)
        self._ask(engine)
        if code is not None:
            raise ending(code, engine.watch, self._plan, engine.process.log)
        if engine.watch.fallback is not None:
            raise fallback(engine.watch, engine.process.log)
        if engine.watch.hangs(now):
            raise hang(engine.watch, self._plan, engine.process.log)
        if engine.probe.error is not None:
            raise self._named(engine.probe.error, engine)

    def _ask(self, engine: _Engine) -> None:
        """Phases that only the probe knows."""
        if engine.probe.ready.is_set():
            if engine.watch.phase != "ready":
                engine.watch.phase = "ready"
                self._tell(engine, "phase: ready")
        elif engine.probe.healthy.is_set() and self._check and engine.watch.phase != "check":
            engine.watch.phase = "check"
            self._tell(engine, "phase: check (a worst-case request)")

    def _named(self, error: TurbofitError, engine: _Engine) -> TurbofitError:
        return type(error)(error.message, hint=f"{error.hint} ({engine.process.log})")

    def _stop(self) -> None:
        """Pass the signal on, wait, kill what is left; all engines share one deadline.

        Before it serves, an engine sits in C++ where SIGINT would wait for ever: SIGTERM ends it.
        """
        for engine in self._engines:
            engine.probe.stop()
        if self._signal is None:
            for engine in self._engines:
                engine.process.kill()
            return
        self._say(f"stopping: {self._signal.name}")
        deadline = time.monotonic() + _DRAIN_SECONDS
        for engine in self._engines:
            serving = engine.watch.phase in ("serving", "check", "ready")
            engine.process.send(self._signal if serving else signal.SIGTERM)
        for engine in self._engines:
            engine.process.wait(deadline - time.monotonic())
            engine.process.kill()

    def _tell(self, engine: _Engine, text: str) -> None:
        self._say(f"[{time.monotonic() - self._began:7.1f} s] {engine.name}: {text}")


_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _port(command: Command) -> int:
    argv = command.argv
    return int(argv[argv.index("--server-port") + 1]) if "--server-port" in argv else DEFAULT_PORT


def _environment(command: Command) -> dict[str, str]:
    """The command's own, and what keeps the engine's output timely and its imports its own."""
    return {**command.env, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
