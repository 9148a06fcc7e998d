from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.plans import plausible_plan
from turbofit.rehearsal.pretend.clock import ClockReading
from turbofit.serving import gpu_monitor
from turbofit.serving.engine import supervised_engine
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.engine.supervised_engine import Silence

#: An engine is looked at so often, in seconds.
TICK = 0.1
PLAN = plausible_plan(gpus=1, tp=1)


def owing(*, owes: bool = True, asked_at: float = 0.0, last_byte_at: float = 0.0) -> Any:
    return SimpleNamespace(owes=owes, asked_at=asked_at, last_byte_at=last_byte_at)


class Engine:
    """One that got ready at 0 s; what it does is set by tests."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, pretend: bool = False, clock: Any = None
    ) -> None:
        self.now = self.used = 0.0
        self.share, self.gpus_busy = 0.0, False
        self.clients = owing(owes=False)
        self.probe = owing(owes=False)
        self.silence = Silence(PLAN, PLAN.engines[0], Timing(), 1, pretend=pretend, clock=clock)
        monkeypatch.setattr(supervised_engine, "processor_seconds", lambda _: self.used)
        monkeypatch.setattr(supervised_engine, "any_busy", lambda _: self.gpus_busy)

    def until(self, *found: str, most: float = 4000.0) -> float:
        """Seconds until it is found like this."""
        began = self.now
        while self.now - began < most:
            self.now += TICK
            self.used += TICK * self.share
            if self.silence.look(self.now, 0.0, [self.probe, self.clients]) in found:
                return round(self.now - began)
        raise AssertionError(f"not {found} within {most} s")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


def test_who_owes_nothing_is_never_silent(engine: Engine) -> None:
    with pytest.raises(AssertionError, match="not"):
        engine.until("works", "doubtful", "hung")


@pytest.mark.parametrize("who", ["clients", "probe"])
def test_without_a_sign_it_hangs_within_75_seconds_of_its_last_word(who: str, engine) -> None:
    engine.now = 1000.0
    setattr(engine, who, owing(asked_at=1000.0))
    assert engine.until("doubtful") == 23
    assert engine.silence.ends_at == 1045.0
    engine.until("hung")
    assert engine.now == pytest.approx(1045.0, abs=2 * TICK)


@pytest.mark.parametrize(("share", "busy"), [(0.1, False), (0.0, True), (0.0, None)])
def test_a_busy_processor_or_gpu_is_a_sign_of_life_for_five_minutes(
    share: float, busy: bool | None, engine: Engine
) -> None:
    engine.share, engine.gpus_busy = share, busy
    engine.clients.owes = True
    assert engine.until("hung") == 300


def test_a_probe_now_and_then_is_no_sign(engine: Engine) -> None:
    engine.share = 0.02
    engine.clients.owes = True
    assert engine.until("hung") == 45


def test_where_the_longest_request_takes_longer_by_forecast_it_has_longer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_engine, "seconds_of", lambda *_: 550.0)
    engine.gpus_busy, engine.clients.owes = True, True
    assert engine.until("hung") == 2200


@pytest.mark.parametrize(
    ("factor", "works_until", "hangs_after"),
    [
        (1.0, 5000.0, 300), (4.0, 5000.0, 1200), (0.0, 5000.0, 300),
        # A picture of 80 s, four times slower than life: its work is done, and nothing comes.
        (4.0, 80.0, 80 + 45), (4.0, 320.0, 320 + 45),
    ],
)  # fmt: skip
def test_a_pretend_gpu_that_works_by_its_clock_is_a_sign_of_life(
    factor: float, works_until: float, hangs_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Any = SimpleNamespace(read=lambda: ClockReading(factor, until=works_until))
    engine = Engine(monkeypatch, pretend=True, clock=clock)
    engine.clients.owes = True
    assert engine.until("hung") == hangs_after


def test_a_token_to_anybody_and_the_end_of_work_begin_it_anew(engine: Engine) -> None:
    engine.clients.owes = engine.probe.owes = True
    engine.until("doubtful")
    engine.clients.last_byte_at = engine.now
    assert engine.until("doubtful") == 23
    engine.share = 1.0
    assert engine.until("works") < 5
    with pytest.raises(AssertionError):
        engine.until("hung", most=100.0)
    engine.share = 0.0
    assert 40 <= engine.until("hung") <= 50


@pytest.mark.parametrize(("first", "later"), [("clients", "probe"), ("probe", "clients")])
def test_who_asks_later_does_not_begin_it_anew(first: str, later: str, engine: Engine) -> None:
    """The supervisor asks once a minute, clients at any time: the last byte to anybody counts."""
    engine.now = 1000.0
    setattr(engine, first, owing(asked_at=900.0, last_byte_at=1000.0))
    engine.until("doubtful")
    setattr(engine, later, owing(asked_at=engine.now, last_byte_at=960.0))
    engine.until("hung")
    assert engine.now == pytest.approx(1045.0, abs=2 * TICK)


def test_while_nobody_looked_it_was_not_silent(engine: Engine) -> None:
    """SIGSTOP of the server, and a virtual machine that is paused, say nothing of its engine."""
    engine.clients.owes = True
    engine.until("works")
    for frozen in (47.0, 4000.0):
        engine.now += frozen
        assert engine.until("hung", "doubtful") == 23
    assert engine.until("hung") == pytest.approx(22, abs=1)


def test_what_it_owed_before_it_was_ready_is_no_debt(engine: Engine) -> None:
    engine.clients = owing(asked_at=-1000.0, last_byte_at=-1000.0)
    assert engine.until("hung") == 45


def test_on_pretend_gpus_its_processes_alone_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, pretend=True)
    engine.gpus_busy, engine.clients.owes = True, True
    assert engine.until("hung") == 45


@pytest.mark.parametrize(
    ("shares", "busy"), [([0, 0], False), ([0, 3], True), ([0, "NA"], None), (["NA", 1], True)]
)
def test_whether_gpus_compute(shares: list[Any], busy: bool | None, monkeypatch) -> None:
    left = iter(shares)

    class Nvml:
        def __enter__(self) -> Nvml:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def query(self, function: str, _: Any) -> Any:
            if function == "nvmlDeviceGetHandleByUUID":
                return "a handle"
            share = next(left)
            return share if isinstance(share, str) else SimpleNamespace(gpu=share)

    monkeypatch.setattr("turbofit.machine.nvml.Nvml", Nvml)
    assert gpu_monitor.any_busy(["a", "b"]) is busy
    monkeypatch.setattr("turbofit.machine.nvml.Nvml", lambda: 1 / 0)
    assert gpu_monitor.any_busy(["a", "b"]) is None
