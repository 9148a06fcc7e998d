"""Starts the engines of one plan, restarts ended engines, and ends all engines."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from turbofit.core.engine_end import End
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.process.signals import StopSignal
from turbofit.gateway.routing.engines import Outage
from turbofit.serving.engine.engine_log import EndedError
from turbofit.serving.engine.launches import Launch
from turbofit.serving.engine.supervised_engine import SupervisedEngine, Supervision

#: Seconds after the drain until an engine that still runs is killed.
_LAST_SECONDS: Final = 10.0


class Supervisor:
    """Starts and watches the engines of one plan, one for each launch; see `NEXT_STATES`."""

    def __init__(
        self, plan: Plan, launches: Sequence[Launch], folder: Path, supervision: Supervision
    ) -> None:
        """Prepare an engine for each launch; `run` starts the engines."""
        self._supervision = supervision
        self._timing, self._clock = supervision.timing, supervision.clock
        #: Whether all engines have been ready at one time: the server opens then, and stays open.
        self._server_open = False
        #: The last outage that the gateway was told of, None after its end.
        self._outage: Outage | None = None
        #: The minutes of `Timing.window`, in which ends are counted and for which an engine rests.
        self._rest_minutes = f"{self._timing.window / 60:.2g}"
        #: The time from which `_tell` counts seconds.
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
        """Launch the engines, and serve until a signal. Call this in the main thread.

        ``on_ready`` is called once with the engines' addresses, when all engines are ready.
        ``on_tick`` is called at each look at the engines. ``on_drain`` is called before the engines
        are stopped, with True if there is no time to drain.

        Raises:
            LaunchError: an engine could not be started.
            EndedError: an engine ended, and restarts do not help.
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

    @property
    def importing(self) -> bool:
        """Whether a starting engine still imports: its log has shown no later phase."""
        starting = (engine for engine in self.engines if engine.state == "starting")
        return any(engine.tracker.phase == "starting" for engine in starting)

    def _follow(
        self, stop: StopSignal, on_ready: Callable[[list[str]], None], on_tick: Callable[[], None]
    ) -> signal.Signals:
        """Watch and restart the engines until a signal comes; return the signal."""
        while stop.signal is None:
            now = self._clock()
            for engine in self.engines:
                if engine.state in ("waiting", "broken"):
                    # No start while a process of the last start is left and may hold memory.
                    if now >= engine.again_at and engine.end(0.0):
                        self._start(engine)
                    continue
                before, ended = engine.state, engine.look(now)
                if self._server_open and engine.state == "ready" and before != "ready":
                    self._supervision.on_back(engine)
                # A second signal (`urgent`) kills the engines: such an end needs no restart.
                if ended is not None and not stop.urgent:
                    self._handle_end(engine, ended, now)
            self._tell_of_rest()
            if not self._server_open and self.ready:
                self._server_open = True
                on_ready([engine.url for engine in self.engines])
            on_tick()
            time.sleep(self._timing.tick)
        return stop.signal

    def _start(self, engine: SupervisedEngine) -> None:
        """Start an engine; if the start of an engine that had served fails, schedule another start.

        Raises:
            OSError, TurbofitError: an engine that had never served cannot be started.
        """
        try:
            engine.start()
        except (OSError, TurbofitError) as exc:  # for example, a checkpoint's mount is away
            if not engine.was_ready:
                raise
            message = getattr(exc, "message", str(exc))
            self._handle_end(engine, End(kind="crash", message=message), self._clock())

    def _handle_end(self, engine: SupervisedEngine, ended: End, now: float) -> None:
        """Schedule an engine's restart, or raise an `EndedError` if a restart would not help."""
        self._end(engine)
        # An engine that was never ready would end in the same way again, unless a signal from
        # outside or a race ended it.
        restart = ended.retryable and (engine.was_ready or ended.kind in ("killed", "raced"))
        if restart or engine.was_ready:
            self._supervision.on_end(engine, ended)  # now, not after the pause of the restart
        ended = replace(ended, group=engine.group)
        if not restart:
            # Other engines may have ended meanwhile, and this is the last look at the engines.
            for other in self.engines:
                end = other.look(now, last=True) if other.process is not None else None
                if end is not None and other.was_ready:
                    self._supervision.on_end(other, end)
            raise EndedError(ended)
        pause = engine.schedule_restart(now)
        self._tell(engine.name, ended.error.message, warning=True)
        if pause is not None:
            self._tell(engine.name, f"starting again in {pause:.1f} s")
            return
        serves = any(other.state == "ready" for other in self.engines)
        if not serves and not self._server_open:
            raise EndedError(ended)
        meanwhile = "the other engines serve" if serves else "no engine serves until then"
        self._tell(
            engine.name,
            f"ended {self._timing.restarts + 1} times: the next start is in {self._rest_minutes} "
            f"minutes; {meanwhile}",
            warning=True,
        )

    def _tell_of_rest(self) -> None:
        """Tell the gateway when all engines rest, and when an engine is started again."""
        broken = all(engine.state == "broken" for engine in self.engines)
        if broken == (self._outage is not None):
            return
        self._outage = None
        if broken:
            reason = (
                f"the inference engine ended {self._timing.restarts + 1} times within "
                f"{self._rest_minutes} minutes and rests"
            )
            until = min(engine.again_at for engine in self.engines)
            self._outage = Outage(reason, until, self._clock)
        self._supervision.on_rest(self._outage)

    def _stop(self, stop: StopSignal) -> None:
        """Pass the signal, if any, to all engines, wait, and kill the engines that still run.

        An engine that does not serve yet runs C++ code, which ignores SIGINT, and gets SIGTERM.
        """
        running = [(engine, engine.process) for engine in self.engines if engine.process]
        for engine, _ in running:
            engine.stop_probe()
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
                f"process {engine.process.pid} has not ended after SIGKILL: the driver or a "
                "debugger holds the process, which may still have GPU memory",
                warning=True,
            )

    def _kill_groups(self) -> None:
        for engine in self.engines:
            if engine.process is not None:
                engine.process.kill_group()

    def _tell(self, name: str, text: str, *, warning: bool = False) -> None:
        """Print a line with the time since the start; ``--quiet`` shows only warnings."""
        sign = "warning: " if warning else ""
        self._supervision.say(f"{sign}[{self._clock() - self._began:7.1f} s] {name}: {text}")
