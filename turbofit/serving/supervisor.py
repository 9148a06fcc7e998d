"""Starts the engines of one plan, restarts those that end, and ends them all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.engine_end import End
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.process.processes import stop_signals, unblock
from turbofit.gateway.routing.engines import Outage
from turbofit.serving.engine.engine_log import EndedError
from turbofit.serving.engine.launches import Launch
from turbofit.serving.engine.supervised_engine import SupervisedEngine, Supervision

#: Seconds beyond the drain until an engine that was told to end is killed.
_LAST_SECONDS: Final = 10.0


class StoppedError(BaseException):
    """Raised by a signal that comes when no engines or servers need an orderly stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class StopSignal:
    """Holds the signal that ends a run; a second signal makes the end urgent. A context manager.

    `stop_signals` says which signals end a run. Use it in the main thread.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        #: The last signal that came; `end` and `end_now` do not set it.
        self.received: signal.Signals | None = None
        self.urgent = False
        #: True while nothing must be stopped in order: a signal then raises `StoppedError`.
        self.abrupt = True
        self._handlers: dict[signal.Signals, Any] = {}
        self._before: dict[signal.Signals, Any] = {}
        self._terminals: tuple[int, ...] = ()
        self._urgent_calls: list[Callable[[], None]] = []
        #: SIGHUP calls it instead of ending the run, unless a terminal closed; it takes no lock.
        self.on_hangup: Callable[[], None] | None = None

    def __enter__(self) -> StopSignal:
        self._terminals = tuple(filter(os.isatty, range(3)))
        numbers = stop_signals()
        self._handlers = dict.fromkeys(numbers, self._caught)
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            # If SIGCHLD is ignored the kernel reaps engines, and their exit status is lost.
            self._handlers[signal.SIGCHLD] = signal.SIG_DFL
        self._before = {number: signal.getsignal(number) for number in self._handlers}
        self.rearm()
        unblock(numbers)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def rearm(self) -> None:
        """Install the signal handlers again, in case a library has replaced them."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the run normally, as the signal ``number`` would."""
        self.signal = self.signal or number

    def resume(self) -> bool:
        """Cancel an end that no signal asked for, so that the run goes on.

        The calls that `on_second` registered are dropped. Returns False, and cancels nothing, if a
        signal has come.
        """
        # In this order a signal that comes meanwhile is not lost.
        self.signal = None
        if self.received is not None:
            self.signal = self.received
            return False
        self._urgent_calls.clear()
        self.abrupt = True
        return True

    def on_second(self, call: Callable[[], None]) -> None:
        """Register a call for the second signal; the call must take no lock."""
        self._urgent_calls.append(call)

    def end_now(self) -> None:
        """End the run immediately, as a second signal would; takes no lock."""
        self.signal = self.signal or signal.SIGTERM
        self.urgent = True
        for call in self._urgent_calls:
            call()

    def _caught(self, number: int, _frame: Any) -> None:
        closed = not all(map(os.isatty, self._terminals))
        if number == signal.SIGHUP and self.on_hangup is not None and not closed:
            self.on_hangup()
            return
        if self.signal is not None:
            self.end_now()
        self.signal = self.received = signal.Signals(number)
        if self.abrupt:
            raise StoppedError(self.signal)


class Supervisor:
    """Starts and watches the engines of one plan, one for each launch; see `NEXT_STATES`."""

    def __init__(
        self, plan: Plan, launches: Sequence[Launch], folder: Path, supervision: Supervision
    ) -> None:
        self._supervision = supervision
        self._timing, self._clock = supervision.timing, supervision.clock
        self._opened = False
        self._outage: Outage | None = None
        self._minutes = f"{self._timing.window / 60:.2g}"
        self._began = self._clock()
        self.engines: list[SupervisedEngine] = []
        for index, launch in enumerate(launches):
            name = f"engine {launch.group}" if len(launches) > 1 else "engine"
            engine = SupervisedEngine(
                plan, launch, folder, partial(self._tell, name),
                supervision, index=index, name=name,
            )  # fmt: skip
            self.engines.append(engine)

    def run(
        self,
        stop: StopSignal,
        on_ready: Callable[[list[str]], None],
        on_tick: Callable[[], None] = lambda: None,
        on_drain: Callable[[bool], None] = lambda _urgent: None,
    ) -> signal.Signals:
        """Launch, wait until ready, serve until a signal. Call it in the main thread.

        ``on_ready`` is called once with the engines' addresses, when all are ready; ``on_tick`` at
        each look; ``on_drain`` before the engines are stopped, with True if there is no time to
        drain.

        Raises:
            LaunchError: an engine could not be started.
            EndedError: an engine ended, and a restart would not help, or did not.
        """
        self._began = self._clock()
        stop.on_second(self._kill_groups)
        stop.abrupt = False
        try:
            for engine in self.engines:
                self._start(engine)
            return self._follow(stop, on_ready, on_tick)
        finally:
            try:
                on_drain(stop.urgent or stop.signal is None)
            finally:
                self._stop(stop)
                stop.abrupt = stop.signal is None

    @property
    def ready(self) -> bool:
        return all(engine.state == "ready" for engine in self.engines)

    @property
    def starting(self) -> bool:
        """Whether an engine starts now; an engine that waits or rests does not count."""
        return any(engine.state == "starting" for engine in self.engines)

    def _follow(
        self, stop: StopSignal, on_ready: Callable[[list[str]], None], on_tick: Callable[[], None]
    ) -> signal.Signals:
        while stop.signal is None:
            now = self._clock()
            for engine in self.engines:
                if engine.state in ("waiting", "broken"):
                    if now >= engine.again_at and engine.end(0.0):
                        self._start(engine)
                    continue
                before, ended = engine.state, engine.look(now)
                if self._opened and before != engine.state == "ready":
                    self._supervision.on_back(engine)
                # A second signal may have killed the engine meanwhile.
                if ended is not None and not stop.urgent:
                    self._mend(engine, ended, now)
            self._rest()
            if not self._opened and self.ready:
                self._opened = True
                on_ready([engine.url for engine in self.engines])
            on_tick()
            time.sleep(self._timing.tick)
        return stop.signal

    def _start(self, engine: SupervisedEngine) -> None:
        """Start an engine; if that fails and it has served, it waits like an engine that ended.

        Raises:
            OSError, TurbofitError: an engine that has not served yet cannot be started.
        """
        try:
            engine.start()
        except (OSError, TurbofitError) as exc:  # its checkpoint is away for a while, for example
            if not engine.was_ready:
                raise
            message = getattr(exc, "message", str(exc))
            self._mend(engine, End(kind="crash", message=message), self._clock())

    def _mend(self, engine: SupervisedEngine, ended: End, now: float) -> None:
        """Schedule an engine's restart, or raise an `EndedError` if a restart would not help."""
        self._end(engine)
        again = ended.retryable and (engine.was_ready or ended.kind in ("killed", "raced"))
        if again or engine.was_ready:
            self._supervision.on_end(engine, ended)  # before the pause
        ended = replace(ended, group=engine.group)
        if not again:
            for other in self.engines:  # those that have ended meanwhile: there is no later look
                end = other.look(now, last=True) if other.process is not None else None
                if end is not None and other.was_ready:
                    self._supervision.on_end(other, end)
            raise EndedError(ended)
        pause = engine.wait(now)
        self._tell(engine.name, ended.error.message, warning=True)
        if pause is not None:
            self._tell(engine.name, f"starting again in {pause:.1f} s")
            return
        serves = any(other.state == "ready" for other in self.engines)
        if not serves and not self._opened:
            raise EndedError(ended)
        meanwhile = "while the others serve" if serves else "no engine serves until another starts"
        self._tell(
            engine.name,
            f"ended {self._timing.restarts + 1} times: left alone for {self._minutes} minutes, "
            f"{meanwhile}",
            warning=True,
        )

    def _rest(self) -> None:
        broken = all(engine.state == "broken" for engine in self.engines)
        if broken == (self._outage is not None):
            return
        self._outage = None
        if broken:
            reason = (
                f"the inference engine ended {self._timing.restarts + 1} times within "
                f"{self._minutes} minutes and rests"
            )
            until = min(engine.again_at for engine in self.engines)
            self._outage = Outage(reason, until, self._clock)
        self._supervision.on_rest(self._outage)

    def _stop(self, stop: StopSignal) -> None:
        """Pass the signal, if any, to all engines, wait, and kill the engines that still run.

        An engine that does not serve yet is in C++, where SIGINT has no effect: SIGTERM ends it.
        """
        running = [(engine, engine.process) for engine in self.engines if engine.process]
        for engine, _ in running:
            engine.quiet()
        if stop.signal is not None:
            self._supervision.say(f"stopping: {stop.signal.name}")
            deadline = time.monotonic() + self._timing.drain + _LAST_SECONDS
            for engine, process in running:
                serving = engine.tracker.phase in ("serving", "check", "ready")
                process.send(stop.signal if serving else signal.SIGTERM)
            for _, process in running:
                process.wait(deadline - time.monotonic())
        self._kill_groups()
        deadline = time.monotonic() + _LAST_SECONDS
        for engine, _ in running:
            self._end(engine, max(0.5, deadline - time.monotonic()))

    def _end(self, engine: SupervisedEngine, seconds: float = _LAST_SECONDS) -> None:
        if not engine.end(seconds) and engine.process is not None:
            self._tell(
                engine.name,
                f"process {engine.process.pid} was killed and has not ended: the driver or a "
                "debugger holds it, and it may still have its GPU memory",
                warning=True,
            )

    def _kill_groups(self) -> None:
        for engine in self.engines:
            if engine.process is not None:
                engine.process.kill_group()

    def _tell(self, name: str, text: str, *, warning: bool = False) -> None:
        """Print a line with its time; with --quiet only warnings are shown."""
        sign = "warning: " if warning else ""
        self._supervision.say(f"{sign}[{self._clock() - self._began:7.1f} s] {name}: {text}")
