"""What an engine is asked before it is ready: how long that takes, and what costs less."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.serving.engine.test_worst_requests import fullest, image_units
from tests.support.plans import changed
from turbofit import api
from turbofit.core.plan import Plan
from turbofit.serving.engine import worst_requests
from turbofit.serving.engine.worst_requests import (
    ProbeRequest,
    cheaper_forward,
    other_worst_requests,
    small_requests,
    worst_request,
)

SEEN = yaml.safe_load(Path(__file__).with_name("checks_seen.yaml").read_text(encoding="utf-8"))
#: Seconds that a calibration waits before each of its readings: of the start, the kernels, and each
#: worst case.
READINGS = 0.3 * 6


def seen_plan(row: dict[str, Any]) -> Plan:
    """The plan of a start that was seen, as far as its check's time rests on it."""
    plan = api.plan(
        row["model"], on=row["card"], engine=row["engine"], max_prefill_token_num=row["prefill"],
        max_batch_size=row["batch"],
    )  # fmt: skip
    return changed(plan, units_per_forward=row["units"])


def calibration(plan: Plan) -> list[ProbeRequest]:
    """What a calibration asks of an engine, with a text of 64 tokens beside its images."""
    worst = worst_request(plan, "m")
    questions = [
        *small_requests(plan, "m"),
        worst,
        *other_worst_requests(plan, plan.engines[0], "m", 64),
    ]
    return list(filter(None, questions))


@pytest.mark.parametrize("row", SEEN, ids=lambda row: "{card} {model} {engine}".format(**row))
def test_the_forecast_is_within_one_and_a_half_of_what_was_seen(row: dict[str, Any]) -> None:
    plan, calibrated = seen_plan(row), row.get("calibrated", False)
    engine = plan.engines[0]
    whole = worst_requests.whole_check(plan, engine, "m")
    questions, waits = (calibration(plan), READINGS) if calibrated else (whole, 0.0)
    forecast = worst_requests.seconds_of(plan, engine, questions) + waits
    assert 1 / 1.5 < forecast / row["seconds"] < 1.5


def asked(plan: Plan, exam: Any) -> list[ProbeRequest]:
    questions: list[ProbeRequest] = []

    def ask(question: ProbeRequest) -> int:
        questions.append(question)
        rule = plan.model.image_rule
        return 64 + (0 if rule is None else sum(map(rule.unit_tokens, question.units)))

    exam(SimpleNamespace(plan=plan, planned=plan.engines[0]), "m", ask)
    return questions


def test_a_long_check_asks_for_the_same_memory_with_fewer_encodings() -> None:
    """Qwen2-VL-2B: 129,600 patches as one image took an H100 55 s, as several 16 by forecast.

    They meet in one forward: the first ends in it and the last begins, whatever the template.
    """
    (row,) = (row for row in SEEN if row["seconds"] == 68.682)
    plan = seen_plan(row)
    small, last = asked(plan, worst_requests.ask_worst)
    assert (small.name, len(small.units)) == ("a small image", 1)
    sizes = image_units(plan, last)
    assert tuple(sizes) == last.units
    assert max(sizes) <= 65_536
    for template in (50, 64, 78):
        assert fullest(plan, sizes, template) >= 0.99 * plan.engines[0].units_per_forward
    (one,) = worst_requests.whole_check(plan, plan.engines[0], "m")[-1].units
    assert fullest(plan, sizes, 64) > one == 130_320
    assert worst_requests.seconds_of(plan, plan.engines[0], [last]) < worst_requests.LONG
    assert (
        worst_requests.check_seconds(plan)
        < worst_requests.LONG
        < worst_requests.seconds_of(
            plan, plan.engines[0], worst_requests.whole_check(plan, plan.engines[0], "m")
        )
    )


def test_a_fullest_forward_of_text_is_not_replaced_by_images(monkeypatch) -> None:
    plan = seen_plan(next(row for row in SEEN if row["seconds"] == 68.682))
    text = ProbeRequest("the fullest forward", "/generate", {}, tokens=1_000_000)
    monkeypatch.setattr(worst_requests, "fullest_forward", lambda *_: text)
    assert worst_requests.cheaper_check(plan, plan.engines[0]) == ()


def test_a_short_check_asks_a_clients_worst_request_and_the_fullest_forward() -> None:
    plan = seen_plan(SEEN[0])
    assert [question.units for question in asked(plan, worst_requests.ask_worst)] == [(13,), (42,)]
    assert [question.name for question in asked(plan, worst_requests.ask_small)] == [
        "a small image"
    ]
    assert (
        cheaper_forward(plan, plan.engines[0], "m", 64) is None
    )  # tiles: no attention over a whole image


def test_a_text_model_is_asked_a_small_text() -> None:
    plan = api.plan("qwen2.5-7b", on="1xrtx3090", concurrency=8)
    assert [question.name for question in asked(plan, worst_requests.ask_small)] == ["a small text"]
    assert worst_requests.check_seconds(plan) > 0
