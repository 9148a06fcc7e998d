"""What a start says of an end, and what it tells others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from tests.support.plans import plausible_plan
from turbofit.core.engine_end import End
from turbofit.core.units import MIB
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.engine.worst_requests import ask_worst
from turbofit.serving.start import Start

PLAN = plausible_plan(gpus=1, tp=1)


@pytest.mark.parametrize(
    ("kind", "taken", "expected"),
    [
        ("killed", False, True),
        ("out_of_memory", True, True),
        ("out_of_memory", False, False),
        ("crash", True, False),
    ],
)
def test_a_lack_of_memory_that_others_took_is_no_fault_of_a_request(kind, taken, expected) -> None:
    start = start_of([])
    start._gpu_monitor = SimpleNamespace(without_headroom=lambda uuids: taken)
    end = End(kind=kind, message=kind, hint="none")
    assert start._other_cause(SimpleNamespace(planned=PLAN.engines[0]), end) is expected


@pytest.mark.parametrize(("pretend", "noted"), [(False, 1), (True, 0)])
def test_others_are_told_of_what_takes_memory_of_real_gpus_alone(pretend: bool, noted: int) -> None:
    told: list[dict[str, Any]] = []
    start_of([], pretend=pretend, note=lambda *_, **facts: told.append(facts))._tick()
    assert len(told) == noted


@pytest.mark.parametrize(("over", "kinds"), [(-MIB, []), (0, []), (MIB, ["beyond_forecast"])])
def test_a_start_beyond_its_forecast_is_a_warning(over: int, kinds: list[str]) -> None:
    said: list[str] = []
    usage = SimpleNamespace(gpu=0, peak=PLAN.ledgers[0].most + over)
    engine = MagicMock(pretended=SimpleNamespace(usages=lambda: [usage]), group=0)
    engine.tracker.figures, engine.launch.tuning = [], None
    engine.tracker.cached_tokens.return_value = None
    start = start_of([engine], on_open=lambda _: None, say=said.append)
    start._ask, start._proof = ask_worst, MagicMock()
    start._open(["http://127.0.0.1:1"])
    assert [call.args[0] for call in start._run.record.event.call_args_list] == kinds
    assert [line.startswith("warning:") for line in said] == [bool(kinds)]


@pytest.mark.parametrize(
    ("importing", "starting", "looks"),
    [(True, True, []), (False, True, [PLAN.host.total]), (False, False, [0])],
)
def test_the_standby_imports_before_ready_once_no_engine_imports(importing, starting, looks):
    asked: list[int] = []
    start = start_of([])
    start._run.standby = SimpleNamespace(look=asked.append)
    start._supervisor.importing, start._supervisor.starting = importing, starting
    start._tick()
    assert asked == looks


def start_of(engines: list[Any], *, pretend: bool = True, **given: Any) -> Any:
    """A start whose engines are these."""
    run = SimpleNamespace(
        config=SimpleNamespace(pretend=pretend, gateway=None, check="none"),
        on_tick=lambda: None, examiner=None, standby=None, folder=MagicMock(),
        leases=SimpleNamespace(note=given.get("note")), on_open=given.get("on_open"),
        say=given.get("say"), record=MagicMock(), starts_trials=False,
    )  # fmt: skip
    described = SimpleNamespace(plan=PLAN, launches=[], timing=Timing(), prepare=None, began=0.0)
    start: Any = Start(cast("Any", run), cast("Any", described))
    start._supervisor = SimpleNamespace(engines=engines, ready=True)
    start._used = dict  # no GPU is read
    return start
