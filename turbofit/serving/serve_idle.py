"""Serves a model at one address, and ends the engines while nobody uses the model."""

from __future__ import annotations

import shutil
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.core.process.signals import StoppedError, StopSignal
from turbofit.core.units import format_duration
from turbofit.gateway.http.about import about_plan
from turbofit.gateway.http.uvicorn_server import keep_large_blocks
from turbofit.gateway.idle import BUSY_SECONDS, AttachedGateway, IdleGateway
from turbofit.gateway.server import GatewayThread
from turbofit.serving.engine.standby import standby_of
from turbofit.serving.options import ServeConfig
from turbofit.serving.plan_gateway import bounds_of
from turbofit.serving.planner import leases_for, preview
from turbofit.serving.run import Run
from turbofit.serving.start import follow

#: How many run folders are kept; each start makes a folder.
_KEPT_RUNS: Final = 50
#: Seconds after a failed start until engines may be started again.
_AGAIN: Final = 60.0
_TICK: Final = 0.1


class Served(NamedTuple):
    """How serving ended: the signal, the last runs' folders, the number of requests cut off."""

    ended: signal.Signals
    folders: list[Path]
    cut: int


def serve_idle(
    config: ServeConfig,
    idle: float,
    stop: StopSignal,
    say: Callable[[str], None],
    on_open: Callable[[str, str], None],
) -> Served:
    """Serve until a signal; engines end after ``idle`` seconds without a request.

    The next request starts the engines again. ``on_open`` receives the address and the model's name
    when the first start is ready. Call this in the main thread.

    Raises:
        TurbofitError: the address cannot be bound, or the first start fails.
    """
    keep_large_blocks()  # before the first thread: only later threads share one heap
    assert config.gateway is not None
    plan = preview(config)
    public = config.gateway.changed(
        drain_seconds=config.timing.drain, pretend=config.pretend,
        names=config.names(plan), about=about_plan(plan),
    )  # fmt: skip
    with leases_for(config) as leases, standby_of(config, say) as standby:
        app = IdleGateway(bounds_of(plan), public)
        address = GatewayThread(app)
        publish = partial(AttachedGateway, address, app)
        run = Run(config, leases, say, publish=publish, standby=standby)
        server = IdleServer(run, app, address, idle)
        ended = server.serve(stop, lambda url: on_open(url, app.name))
    return Served(ended, list(server.folders), address.cut)


class IdleServer:
    """Keeps an address open, and serves one run after another of the same model there.

    ``idle``: seconds without a request after which the engines end. ``folders`` are the folders of
    the last runs.
    """

    def __init__(
        self, run: Run, app: IdleGateway, address: GatewayThread[IdleGateway], idle: float
    ) -> None:
        self._run, self._app, self._address, self._idle = run, app, address, idle
        self.folders: deque[Path] = deque()

    def serve(self, stop: StopSignal, on_open: Callable[[str], None]) -> signal.Signals:
        """Serve until a signal; return the signal."""
        run, app, address = self._run, self._app, self._address
        address.start()
        run.say(f"{address.url} is open: requests wait until the model, which starts now, is ready")

        def opened(_: list[str]) -> None:
            run.on_open = lambda _: None  # later starts open nothing: the address stays
            on_open(address.url)

        run.on_open, run.on_tick = opened, partial(self._end_unused_engines, stop)
        try:
            self._run_once(stop)
            while stop.resume():
                while stop.signal is None and not (app.waiting and app.rested):
                    if run.standby is not None:
                        run.standby.look(0 if run.plan is None else run.plan.host.total)
                    time.sleep(_TICK)
                if stop.signal is None:
                    self._run_once(stop)
        except StoppedError as exc:
            stop.end(exc.signal)
        finally:
            stop.abrupt = False
            stop.on_second(address.cut_off)
            with suppress(LaunchError):
                address.call(IdleGateway.end)
            address.stop(drain=not stop.urgent and stop.signal is not None)
        assert stop.signal is not None
        return stop.signal

    def _run_once(self, stop: StopSignal) -> None:
        """Plan with the free memory, launch the engines, and watch the engines until their end.

        If a later start fails, waiting clients get an error.

        Raises:
            TurbofitError: the first start failed.
        """
        run, app = self._run, self._app
        stop.on_second(self._address.cut_off)
        self._address.call(IdleGateway.begin, BUSY_SECONDS)
        try:
            with run.leases:
                run.prepare()
                if len(self.folders) == _KEPT_RUNS:
                    shutil.rmtree(self.folders.popleft(), ignore_errors=True)
                self.folders.append(run.begin())
                follow(run, stop)
        except TurbofitError as exc:
            if not app.opened:
                raise
            message = exc.message
            run.say(f"warning: {message}; the next start is in {format_duration(_AGAIN)} at least")
            self._address.call(lambda app: app.fail(message, _AGAIN), BUSY_SECONDS)
        else:
            self._address.call(IdleGateway.sleep, BUSY_SECONDS)

    def _end_unused_engines(self, stop: StopSignal) -> None:
        """End the engines when no request has come for the idle time."""
        app = self._app
        if stop.signal is not None:
            return
        if app.state == "ready" and app.idle >= self._idle:
            unused = app.idle
            if self._address.call(lambda app: app.close_idle(self._idle), BUSY_SECONDS):
                self._run.say(
                    f"no request for {format_duration(unused)}: the engines end and give their "
                    "memory back"
                )
        if app.state == "ending" and not app.in_flight:
            stop.end()
