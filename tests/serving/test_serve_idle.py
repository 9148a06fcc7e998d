"""A model whose engines end while nobody uses it: its starts, and what a failed one leaves."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.gateway import CHAT, Recorder, chat, gateway, plan_for
from tests.support.serving import ask_at
from tests.support.waiting import HANG, until
from turbofit.core.errors import DoesNotFitError, TurbofitError
from turbofit.core.process.signals import StopSignal
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.idle import AttachedGateway, IdleGateway
from turbofit.gateway.server import GatewayThread
from turbofit.serving import serve_idle
from turbofit.serving.plan_gateway import bounds_of
from turbofit.serving.serve_idle import IdleServer


class Site:
    """A server whose engines are a recorder; it runs in a thread, without a signal's handler."""

    def __init__(self, tmp_path: Path, idle: float) -> None:
        config = GatewayConfig(port=0, drain_seconds=HANG, names={"a": "a"})
        self.app = IdleGateway(bounds_of(plan_for()), config)
        self.address = GatewayThread(self.app)
        self.said: list[str] = []
        self.events: list[str] = []
        #: What the next start raises.
        self.failing: list[TurbofitError] = []
        #: The next start waits for this.
        self.slow: threading.Event | None = None
        self.dying = False
        self._folder, self._number = tmp_path, 0
        run: Any = SimpleNamespace(
            say=self.said.append, leases=nullcontext(), standby=None, plan=None,
            prepare=self._prepare, begin=self._begin,
        )  # fmt: skip
        self.run = run
        self.server = IdleServer(run, self.app, self.address, idle)
        self.stop = StopSignal()
        self.ended: Any = None
        self._opened: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _prepare(self) -> None:
        if self.failing:
            raise self.failing.pop()

    def _begin(self) -> Path:
        folder = self._folder / str(self._number)
        folder.mkdir()
        self._number += 1
        return folder

    def follow(self, run: Any, stop: StopSignal) -> None:
        """As `follow.follow`, until it is told to end."""
        stop.abrupt = False
        self.events.append("start")
        if self.slow is not None:
            assert self.slow.wait(HANG)
        inner, _ = gateway(recorder=Recorder(), names={"a": "a"})
        side = AttachedGateway(self.address, self.app, inner)
        side.start()
        run.on_open([side.url])
        while stop.signal is None and not self.dying:
            run.on_tick()
            time.sleep(0.005)
        side.stop()
        self.events.append("end")
        if self.dying:
            self.dying = False
            raise DoesNotFitError("out of memory after 4 starts", hint="see the table")

    def _serve(self) -> None:
        try:
            self.ended = self.server.serve(self.stop, self._opened.put)
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            self.ended = exc
            self._opened.put(exc)

    def __enter__(self) -> Site:
        self._thread.start()
        self.opened = self._opened.get(timeout=HANG)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.received = signal.SIGTERM
        self.stop.end()
        self._thread.join(HANG)
        assert not self._thread.is_alive()

    def ask(self) -> tuple[int, Any]:
        status, _, body = ask_at(self.address.url, CHAT, {**chat(), "model": "a"})
        return status, body


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with ExitStack() as stack:

        def make(*, idle: float = 0.02, failing: bool = False) -> Site:
            one = Site(tmp_path, idle)
            one.failing += [NO_ROOM] * failing
            monkeypatch.setattr(serve_idle, "follow", one.follow)
            return stack.enter_context(one)

        yield make


NO_ROOM = DoesNotFitError("somebody took 9.0 GiB", hint="stop it")


def test_idle_engines_end_and_the_next_request_starts_them(site: Any) -> None:
    one = site()
    assert one.opened == one.address.url
    assert one.said[0] == (
        f"{one.address.url} is open: requests wait until the model, which starts now, is ready"
    )
    for _ in range(3):
        until(lambda: one.app.state == "asleep", "asleep")
        assert (one.events[-1], one.ask()[0]) == ("end", 200)
    assert any("no request for" in text for text in one.said)


def test_folders_of_the_last_runs_are_kept(site: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(serve_idle, "_KEPT_RUNS", 2)
    one = site()
    for number in range(3):
        until(lambda: one.app.state == "asleep", "asleep")
        assert one.ask()[0] == 200
        assert (tmp_path / str(number + 1)).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}
    assert [folder.name for folder in one.server.folders] == ["2", "3"]


def test_a_failed_start_is_told_and_tried_again_when_asked_for(site: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(serve_idle, "_AGAIN", 3600.0)
    one = site()
    until(lambda: one.app.state == "asleep", "asleep")
    one.failing.append(NO_ROOM)
    for _ in range(2):
        status, body = one.ask()
        assert (status, body["error"]["code"]) == (503, "model_unavailable")
        assert "somebody took 9.0 GiB" in body["error"]["message"]
    assert any("the next start is in 1 h at least" in text for text in one.said)
    one.address.call(lambda app: app.fail("as before", 0.0))
    assert one.ask()[0] == 200


def test_engines_that_end_for_good_start_again_when_asked_for(site: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(serve_idle, "_AGAIN", 0.0)
    one = site(idle=3600.0)
    one.dying = True
    until(lambda: one.app.state == "failed", "failed")
    assert one.ask()[0] == 200
    assert any("out of memory after 4 starts" in text for text in one.said)


def test_a_first_start_that_fails_ends_the_server(site: Any) -> None:
    one = site(failing=True)
    assert one.opened is NO_ROOM
    assert one.events == []
    assert not one.address.alive


def test_a_signal_while_engines_start_ends_it(site: Any, monkeypatch: Any, tmp_path: Path) -> None:
    one = Site(tmp_path, 3600.0)
    one.slow = threading.Event()
    monkeypatch.setattr(serve_idle, "follow", one.follow)
    one._thread.start()
    until(lambda: one.events == ["start"], "it starts")
    one.stop.received = signal.SIGTERM
    one.stop.end()
    one.slow.set()
    one.__exit__()
    assert (one.events, one.ended) == (["start", "end"], signal.SIGTERM)
