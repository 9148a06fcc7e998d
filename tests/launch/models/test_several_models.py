"""Several models: folders of their starts, whose engines run and whose take turns."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.gateway import CHAT, Recorder, chat, gateway, plan_for
from tests.support.serving import ask_at
from tests.support.waiting import HANG, until
from turbofit.core.errors import DoesNotFitError, TurbofitError
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.models import ModelsGateway, ServedModel
from turbofit.gateway.server import GatewayThread
from turbofit.launch import serve_models
from turbofit.launch.serve.supervisor import StopSignal
from turbofit.launch.serve_models import ModelRun, ModelsPolicy, SeveralModels, gives_way


def test_only_folders_of_runs_that_have_ended_are_removed(tmp_path: Path, monkeypatch) -> None:
    launches: dict[str, Any] = {}

    class Run:
        def __init__(self, name: str, *_: Any, **__: Any) -> None:
            self._name, self._starts = name, 0

        def prepare(self) -> None:
            self._starts += 1

        def begin(self) -> Path:
            self.folder = tmp_path / f"{self._name}-{self._starts}"
            self.folder.mkdir()
            return self.folder

        def follow(self, _: Any) -> None:
            if self.folder.name == "busy-1":
                for _ in range(serve_models._KEPT_RUNS + 1):
                    launches["sleepy"](None, None)
                assert self.folder.exists()

    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr(serve_models, "Run", Run)
    monkeypatch.setattr(
        serve_models, "ModelRun",
        lambda model, _, launch, __: launches.update({model.name: launch}),
    )  # fmt: skip
    folders: deque[Path] = deque()
    for name in ("busy", "sleepy"):
        plan = SimpleNamespace(model=SimpleNamespace(weight_bytes=1))
        planned: Any = SimpleNamespace(config=name, plan=plan)
        model: Any = SimpleNamespace(name=name)
        serve_models._model_run(planned, model, None, folders, print, shared=False)
    launches["busy"](None, None)
    names = {path.name for path in tmp_path.iterdir()} - {"leases"}
    assert names == {folder.name for folder in folders}
    assert len(names) == serve_models._KEPT_RUNS
    assert "busy-1" in names


#: What three clients ask for.
LINES = ("abcabc", "cba", "bbb")


class Site:
    """A server of models whose engines are recorders."""

    def __init__(self, *names: str, wait: float = HANG, **policy: Any) -> None:
        self.models = {name: ServedModel(name) for name in names}
        config = GatewayConfig(port=0, drain_seconds=HANG)
        bounds = [bounds_of(plan_for()) for _ in names]
        app = ModelsGateway(list(self.models.values()), bounds, config, wait=wait)
        self.front = GatewayThread(app)
        self.runs = [
            ModelRun(model, size, partial(self._launch, name), self.front)
            for size, (name, model) in enumerate(self.models.items(), 1)
        ]
        self.said: list[str] = []
        self.events: list[str] = []
        self.most = 0
        #: The next start of a model waits for this.
        self.slow: dict[str, threading.Event] = {}
        #: What the next start of a model raises.
        self.failing: dict[str, TurbofitError] = {}
        #: Models whose engines end, and no other start would help.
        self.dying: set[str] = set()
        self._running: set[str] = set()
        policies = ModelsPolicy(**{"tick": 0.005, **policy})
        self._several = SeveralModels(self.runs, self.front, policies, self.said.append)
        self.stop = StopSignal()
        self._opened: queue.Queue[Any] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _launch(self, name: str, stop: StopSignal, publish: Any) -> None:
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
            until(lambda: stop.signal is not None or name in self.dying, "told to end")
            side.stop()
        self._running.remove(name)
        self.events.append(f"end {name}")
        if name in self.dying:
            self.dying.remove(name)
            raise DoesNotFitError("out of memory after 4 starts", hint="see the table")

    def _run(self) -> None:
        try:
            self._several.run(self.stop, self._opened.put)
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            self._opened.put(exc)

    def __enter__(self) -> Site:
        self.thread.start()
        self.opened = self._opened.get(timeout=HANG)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.end()
        self.thread.join(HANG)
        assert not self.thread.is_alive()
        assert not self._running

    def becomes(self, name: str, state: str) -> None:
        """Wait until a model has this state."""
        until(lambda: self.models[name].state == state, f"{name} {state}")

    def ask(self, name: str) -> tuple[int, Any]:
        status, _, body = ask_at(self.front.url, CHAT, {**chat(), "model": name})
        return status, body


@pytest.fixture
def site() -> Iterator[Any]:
    with ExitStack() as sites:
        yield lambda *names, **given: sites.enter_context(Site(*names, **given))


def test_idle_engines_end_and_the_next_request_starts_them(site) -> None:
    one = site("a", idle=0.02)
    waited, call = [], one.front.call

    def counted(ask: Any, seconds: float = 10.0) -> Any:
        waited.append(seconds)
        return call(ask, seconds)

    one.front.call = counted
    for number in range(3):
        one.becomes("a", "asleep")
        assert one.events[-1] == "end a"
        assert one.ask("a")[0] == 200
        assert one.models["a"].starts == number + 2
    assert any("nobody asked for" in text for text in one.said)
    assert one.models["a"].start_seconds is not None
    # An address may be busy for a minute: with the ten seconds of others it ended the server.
    assert set(waited) == {60.0}


def test_models_take_turns_and_never_run_together(site) -> None:
    one = site("a", "b", "c", turn=0.01)
    with ThreadPoolExecutor(3) as pool:
        clients = pool.map(lambda names: [one.ask(name)[0] for name in names], LINES)
        assert list(clients) == [[200] * len(names) for names in LINES]
    assert one.most == 1
    assert {"start a", "start b", "start c"} < set(one.events)
    assert any("makes way for" in text for text in one.said)


def test_as_many_as_may_run_together(site) -> None:
    one = site("a", "b", "c", at_once=2)
    assert [one.models[name].state for name in "abc"] == ["ready", "ready", "asleep"]
    # A start is forecast by the weights of a measured one.
    first, second = (one.models[name].start_seconds for name in "ab")
    forecast = pytest.approx(max(3 * first, 3 / 2 * second))
    until(lambda: one.models["c"].forecast == forecast, "a forecast")
    assert one.models["a"].expected == first
    assert one.ask("a")[0] == one.ask("c")[0] == 200
    assert one.most == 2
    # The one that was used least recently made way.
    assert one.events[-2:] == ["end b", "start c"]
    assert one.models["a"].state == "ready"


@pytest.mark.parametrize(("again", "rests"), [(3600.0, True), (0.01, False)])
def test_a_failed_start_leaves_the_others_alone_and_is_tried_again_when_asked_for(
    site, again: float, rests: bool
) -> None:
    one = site("a", "b", at_once=1, turn=0.01, again=again)
    one.failing["b"] = DoesNotFitError("somebody took 9.0 GiB", hint="stop it")
    status, body = one.ask("b")
    assert (status, body["error"]["code"]) == (503, "model_unavailable")
    assert "somebody took 9.0 GiB" in body["error"]["message"]
    assert one.ask("a")[0] == 200
    if rests:
        assert any("left alone for 1 h" in text for text in one.said)
    else:
        until(lambda: one.models["b"].rested, "may be started")
        assert one.ask("b")[0] == 200


def test_a_model_that_is_to_run_always_is_tried_again_by_itself(site) -> None:
    one = site("a", "b", at_once=2, again=0.01)
    one.failing["b"] = DoesNotFitError("somebody took 9.0 GiB", hint="stop it")
    one.dying.add("b")
    until(lambda: one.models["b"].starts == 2, "started again")
    assert one.ask("b")[0] == 200
    assert any("somebody took 9.0 GiB" in text for text in one.said)


def test_no_idle_engine_ends_while_another_one_starts(site) -> None:
    """A cache is a share of what is free: it would take what that one gives back."""
    one = site("a", "b", idle=0.3, at_once=2)
    for name in "ab":
        one.becomes(name, "asleep")
    one.slow["b"] = waits = threading.Event()
    assert one.ask("a")[0] == 200
    asker = threading.Thread(target=one.ask, args=("b",))
    asker.start()
    one.becomes("b", "starting")
    until(lambda: one.models["a"].idle > 0.6, "a is idle for long")
    assert one.models["a"].state == "ready"
    waits.set()
    asker.join(HANG)
    one.becomes("a", "asleep")


def test_a_first_start_that_fails_ends_the_server() -> None:
    one = Site("a", "b", at_once=2)
    one.failing["b"] = DoesNotFitError("no room", hint="buy one")
    with one:
        assert isinstance(one.opened, DoesNotFitError)
    assert one.events == ["start a", "end a"]


def test_after_a_signal_no_other_first_model_starts() -> None:
    one = Site("a", "b", at_once=2)
    may_start = one.slow["a"] = threading.Event()
    one.thread.start()
    until(lambda: one.events == ["start a"], "a starts")
    one.stop.end()
    until(lambda: one.runs[0].ending, "a is told to end")
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
