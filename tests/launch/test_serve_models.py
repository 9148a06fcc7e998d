"""Several models: folders of their starts, whose engines run and whose take turns."""

from __future__ import annotations

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import CHAT, Recorder, chat, gateway, plan_for
from tests.support.waiting import HANG, until
from turbofit.core.errors import DoesNotFitError, TurbofitError
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.models import AttachedGateway, ModelsGateway, ServedModel
from turbofit.gateway.server import GatewayThread
from turbofit.launch import serve_models
from turbofit.launch.serve.supervisor import StopSignal
from turbofit.launch.serve_models import ModelRun, ModelsPolicy, SeveralModels, gives_way


def test_folders_of_the_last_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        starts = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def prepare(self) -> None:
            self.starts += 1

        def begin(self) -> Path:
            folder = tmp_path / str(self.starts)
            folder.mkdir()
            return folder

    def follow(run: Run, _: Any) -> None:
        assert (tmp_path / str(run.starts)).exists()

    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr(serve_models, "Run", Run)
    monkeypatch.setattr(serve_models, "follow", follow)
    nothing: Any = None
    run = ModelRun(nothing, ServedModel("a"), nothing, print, shared=False)
    for _ in range(serve_models._KEPT_RUNS + 2):
        run.serve(StopSignal())
    names = {path.name for path in tmp_path.iterdir()} - {"leases"}
    assert names == {folder.name for folder in run.folders}
    assert len(names) == serve_models._KEPT_RUNS
    assert not names & {"1", "2"}


class Launched(ModelRun):
    """A model whose engines are a recorder."""

    def __init__(self, model: ServedModel, launch: Any, front: Any) -> None:
        self.model, self.under_way, self._stop = model, None, StopSignal()
        self._launch, self._publish = launch, partial(AttachedGateway, front, model)

    def serve(self, stop: StopSignal) -> None:
        self._launch(stop, self._publish)


class Site:
    """A server of models whose engines are recorders."""

    def __init__(self, *names: str, wait: float = HANG, **policy: Any) -> None:
        self.models = {name: ServedModel(name) for name in names}
        config = GatewayConfig(port=0, drain_seconds=HANG)
        bounds = [bounds_of(plan_for()) for _ in names]
        app = ModelsGateway(list(self.models.values()), bounds, config, wait=wait)
        self.front = GatewayThread(app)
        runs = [
            Launched(model, self._launch(name), self.front) for name, model in self.models.items()
        ]
        self.said: list[str] = []
        self.events: list[str] = []
        self.most = 0
        #: The next start of a model waits for this.
        self.slow: dict[str, threading.Event] = {}
        self._running: set[str] = set()
        self._dying: set[str] = set()
        #: What the next start of a model raises.
        self.failing: dict[str, TurbofitError] = {}
        self._policy = ModelsPolicy(**{"tick": 0.005, **policy})
        self._several = SeveralModels(runs, self.front, self._policy, self.said.append)
        self.stop = StopSignal()
        self.ended: Any = None
        self._opened: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _launch(self, name: str) -> Any:
        def launch(stop: StopSignal, publish: Any) -> None:
            if name in self.failing:
                raise self.failing.pop(name)
            self.events.append(f"start {name}")
            self._running.add(name)
            self.most = max(self.most, len(self._running))
            if name in self.slow:
                assert self.slow.pop(name).wait(HANG)
            if stop.signal is None:
                inner, _ = gateway(recorder=Recorder())
                side = publish(inner)
                side.start()
                until(lambda: stop.signal is not None or name in self._dying, "told to end")
                side.stop()
            self._running.remove(name)
            self.events.append(f"end {name}")
            if name in self._dying:
                self._dying.remove(name)
                raise DoesNotFitError("out of memory after 4 starts", hint="see the table")

        return launch

    def end_run(self, name: str) -> None:
        """Its engines ended, and no other start would help."""
        self._dying.add(name)

    def run_of(self, name: str) -> ModelRun:
        return next(one for one in self._several.runs if one.model.name == name)

    def _run(self) -> None:
        try:
            self.ended = self._several.run(self.stop, self._opened.put)
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            self.ended = exc
            self._opened.put(exc)

    def __enter__(self) -> Site:
        self._thread.start()
        self.opened = self._opened.get(timeout=HANG)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.end()
        self._thread.join(HANG)
        assert not self._thread.is_alive()
        assert not self._running

    def ask(self, name: str) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"{self.front.url}{CHAT}", json.dumps({**chat(), "model": name}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=HANG) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, json.loads(exc.read())


@pytest.fixture
def site() -> Iterator[Any]:
    made: list[Site] = []

    def make(*names: str, **given: Any) -> Site:
        made.append(Site(*names, **given).__enter__())
        return made[-1]

    yield make
    for one in made:
        one.__exit__()


def test_idle_engines_end_and_the_next_request_starts_them(site) -> None:
    one = site("a", idle=0.02)
    assert one.said[0] == (
        f"{one.front.url} is open: a request waits until its model is ready; a starts now"
    )
    for number in range(3):
        until(lambda: one.models["a"].state == "asleep", "asleep")
        assert one.events[-1] == "end a"
        assert one.ask("a")[0] == 200
        assert one.models["a"].starts == number + 2
    assert any("nobody asked for" in text for text in one.said)
    assert one.models["a"].start_seconds is not None


def test_models_take_turns_and_never_run_together(site) -> None:
    one = site("a", "b", "c", turn=0.01)
    results: list[int] = []

    def client(names: str) -> None:
        results.extend(one.ask(name)[0] for name in names)

    threads = [threading.Thread(target=client, args=(names,)) for names in ("abcabc", "cba", "bbb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert results == [200] * 12
    assert one.most == 1
    starts = [event for event in one.events if event.startswith("start")]
    assert {"start a", "start b", "start c"} == set(starts)
    assert any("makes way for" in text for text in one.said)


def test_as_many_as_may_run_together(site) -> None:
    one = site("a", "b", "c", at_once=2)
    assert [one.models[name].state for name in "abc"] == ["ready", "ready", "asleep"]
    assert one.ask("a")[0] == 200
    assert one.ask("c")[0] == 200
    assert one.most == 2
    # The one that was used least recently made way.
    assert one.events[-2:] == ["end b", "start c"]
    assert one.models["a"].state == "ready"


def test_a_model_that_does_not_start_leaves_the_others_alone(site) -> None:
    one = site("a", "b", at_once=1, turn=0.01, again=3600.0)
    one.failing["b"] = DoesNotFitError("somebody took 9.0 GiB", hint="stop it")
    status, body = one.ask("b")
    assert (status, body["error"]["code"]) == (503, "model_unavailable")
    assert "somebody took 9.0 GiB" in body["error"]["message"]
    assert one.ask("a")[0] == 200
    assert any("left alone for 1 h" in text for text in one.said)


def test_a_failed_start_is_tried_again_when_asked_for(site) -> None:
    one = site("a", "b", turn=0.01, again=0.01)
    one.failing["b"] = DoesNotFitError("somebody took 9.0 GiB", hint="stop it")
    assert one.ask("b")[0] == 503
    until(lambda: one.models["b"].rested, "may be started")
    assert one.ask("b")[0] == 200


def test_a_model_that_is_to_run_always_is_tried_again_by_itself(site) -> None:
    one = site("a", "b", at_once=2, again=0.01)
    one.failing["b"] = DoesNotFitError("somebody took 9.0 GiB", hint="stop it")
    one.end_run("b")
    until(lambda: one.models["b"].starts == 2, "started again")
    assert one.ask("b")[0] == 200
    assert any("somebody took 9.0 GiB" in text for text in one.said)


def test_an_address_may_be_busy_for_a_minute(site) -> None:
    """With the ten seconds of other questions a busy one ended the server."""
    one = site("a", idle=0.02)
    given, call = [], one.front.call

    def counted(ask: Any, seconds: float = 10.0) -> Any:
        given.append(seconds)
        return call(ask, seconds)

    one.front.call = counted
    until(lambda: one.models["a"].state == "asleep", "asleep")
    assert one.ask("a")[0] == 200
    assert set(given) == {60.0}


def test_no_idle_engine_ends_while_another_one_starts(site) -> None:
    """A cache is a share of what is free: it would take what that one gives back."""
    one = site("a", "b", idle=0.3, at_once=2)
    until(lambda: one.models["a"].state == one.models["b"].state == "asleep", "both asleep")
    one.slow["b"] = waits = threading.Event()
    assert one.ask("a")[0] == 200
    asker = threading.Thread(target=one.ask, args=("b",))
    asker.start()
    until(lambda: one.models["b"].state == "starting", "b starts")
    until(lambda: one.models["a"].idle > 0.6, "a is idle for long")
    assert one.models["a"].state == "ready"
    waits.set()
    asker.join(HANG)
    until(lambda: one.models["a"].state == "asleep", "a asleep")


def test_a_first_start_that_fails_ends_the_server() -> None:
    one = Site("a", "b", at_once=2)
    one.failing["b"] = DoesNotFitError("no room", hint="buy one")
    with one:
        assert isinstance(one.opened, DoesNotFitError)
    assert one.events == ["start a", "end a"]


def test_after_a_signal_no_other_first_model_starts() -> None:
    one = Site("a", "b", at_once=2)
    may_start = one.slow["a"] = threading.Event()
    one._thread.start()
    until(lambda: one.events == ["start a"], "a starts")
    one.stop.end()
    until(lambda: one.run_of("a").ending, "a is told to end")
    may_start.set()
    one.__exit__()
    assert one.events == ["start a", "end a"]


def test_the_turn_of_the_model_that_was_used_least_recently_ends_first() -> None:
    now = time.monotonic()
    old, busy, fresh, idle = (ServedModel(name) for name in ("old", "busy", "fresh", "idle"))
    for model in (old, busy, fresh, idle):
        model.state, model.ready_at, model.used_at = "ready", now - 60, now - 1
    old.used_at, fresh.ready_at = now - 1.5, now - 5
    busy.in_flight, idle.ready_at, idle.used_at = 1, now - 20, now - 10
    assert gives_way([busy, fresh], 30, now) is busy
    assert gives_way([busy, fresh, old], 30, now) is old
    assert gives_way([fresh], 30, now) is None
    assert gives_way([busy, old, idle], 30, now) is idle
    old.state = "ending"
    assert gives_way([old, fresh], 30, now) is None
