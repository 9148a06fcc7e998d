"""Which cache ratio an engine's starts get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.plans import plausible_plan
from turbofit.core.rehearsal import End
from turbofit.core.run_report import RunMoment
from turbofit.launch.engine.launches import SharedCards, ratio_now
from turbofit.launch.run import Start
from turbofit.launch.serve.start_progress import StartProgress

PLAN = plausible_plan(gpus=1, tp=1)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({}, ratio_now),
        ({"shared": SharedCards()}, SharedCards.ratio),
        ({"fixed": {"cache_max_entry_count": 0.5}}, None),
        ({"config": SimpleNamespace(pretend=True)}, None),
    ],
)
def test_a_start_gets_a_ratio_where_others_may_be_on_its_cards(
    run: dict[str, Any], expected: Any
) -> None:
    beside = {"shared": None, "fixed": {}, "config": SimpleNamespace(pretend=False), **run}
    ratio = Start(SimpleNamespace(**beside), PLAN, 0)._ratio(0)
    function = None if ratio is None else ratio.func
    assert getattr(function, "__func__", function) is expected


@pytest.mark.parametrize(
    ("kind", "taken", "expected"),
    [
        ("killed", False, True),
        ("out_of_memory", True, True),
        ("out_of_memory", False, False),
        ("crash", True, False),
    ],
)
def test_a_lack_of_memory_that_others_took_is_no_fault_of_a_request(
    kind: Any, taken: bool, expected: bool
) -> None:
    start = Start(SimpleNamespace(), PLAN, 0)
    start._gpu_monitor = SimpleNamespace(without_headroom=lambda uuids: taken)  # type: ignore[assignment]
    end = End(kind=kind, message=kind, hint="none")
    assert start._other_cause(SimpleNamespace(group=0), end) is expected


@pytest.mark.parametrize(("pretend", "noted"), [(False, 1), (True, 0)])
def test_others_are_told_of_what_takes_memory_of_real_gpus_alone(pretend: bool, noted: int) -> None:
    told: list[dict[str, Any]] = []
    leases = SimpleNamespace(note=lambda **facts: told.append(facts), unwritten=True)
    config = SimpleNamespace(pretend=pretend)
    record = SimpleNamespace(unwritten=False)
    run = SimpleNamespace(
        config=config, leases=leases, record=record, on_tick=lambda: None, examiner=None
    )
    record.attempt = lambda **_: None
    start = Start(run, PLAN, 0)
    start._supervisor = SimpleNamespace(engines=[])  # type: ignore[assignment]
    start._start_progress = StartProgress(PLAN, {})
    start._moments = [RunMoment(phase="", at=0.0, used={})]
    start._tick()
    assert len(told) == noted
