"""What a plan says of choices beside its own."""

from __future__ import annotations

import pytest

import turbofit
from turbofit.machine.presets import other_sizes
from turbofit.planning.alternatives import WITHOUT
from turbofit.report.painters.terminal import paint
from turbofit.report.views.plan_view import plan_view


def instead(plan: turbofit.Plan) -> list[str]:
    """What a plan says of leaving its options out."""
    return [text for text in plan.warnings if text.startswith(WITHOUT)]


@pytest.mark.parametrize("on", ["4xrtx3090", "4x4090"])
def test_a_given_tp_that_costs_much_says_what_is_served_without_it(on: str) -> None:
    tp = int(on[0])
    plan = turbofit.plan("internvl2-8b", on=on, tp=tp)
    (told,) = instead(plan)
    limit, context = plan.promise.image_limit, plan.promise.context
    other = turbofit.plan("internvl2-8b", on=on, max_dynamic_patch=limit, context=context)
    assert plan.usual_image
    assert other.usual_image
    times = other.usual_image.requests_per_second / plan.usual_image.requests_per_second
    assert times > 1.5
    assert f"without --tp {tp}: {other.replicas} engines, {times:.1f} times the requests/s" in told
    assert (plan.tp, plan.replicas) == (tp, 1)  # what was given stays
    lines = paint(plan_view(plan), short=True).splitlines()
    assert any("without --tp" in line for line in lines)
    assert len(lines) <= 20


@pytest.mark.parametrize(
    "given",
    [
        {"tp": 1}, {"tp": 4, "goal": "latency"}, {"concurrency": 2}, {}, {"tp": 4, "least": True},
        {"max_prefill_token_num": 1024},
    ],
)  # fmt: skip
def test_options_that_cost_little_or_have_another_goal_say_nothing(given) -> None:
    assert not instead(turbofit.plan("internvl2-8b", on="4xrtx3090", **given))


def test_without_a_known_speed_the_kv_tokens_decide() -> None:
    plan = turbofit.plan("internvl2-8b", on="4xt4", tp=2, replicas=1)
    (told,) = instead(plan)
    assert plan.throughput.requests_per_second is None
    assert told.startswith("without --tp 2 --replicas 1: ")
    assert "KV tokens" in told


@pytest.mark.parametrize(
    ("model", "on", "size", "fits"),
    [
        ("internvl2-8b", "v100", "v100-32g", True), ("internvl2-8b", "t4+V100", "v100-32g", True),
        ("internvl2-4b", "4060ti", "rtx4060ti-8g", False),
    ],
)  # fmt: skip
def test_another_size_of_a_card_is_named_where_it_changes_the_verdict(model, on, size, fits):
    plan = turbofit.plan(model, on=on)
    (told,) = (text for text in plan.warnings if text.startswith(f"on {size}: "))
    there = turbofit.plan(model, on="+".join((*on.split("+")[:-1], size)))
    assert (plan.fits, there.fits) == (not fits, fits)
    if fits:
        assert f"fits, {there.promise.requests} request" in told
    assert told in paint(plan_view(plan), short=True)


@pytest.mark.parametrize("on", ["4090", "a100", "rtx3060:total=7823MiB", "v100-32g"])
def test_another_size_with_the_same_verdict_is_not_planned(on: str) -> None:
    warnings = turbofit.plan("internvl2-2b", on=on).warnings
    assert not [text for text in warnings if text.startswith("on ")]


@pytest.mark.parametrize("on", ["v100", "2xa100", "4090:free=20GiB", "2080ti"])
def test_the_first_line_names_the_size_that_was_taken_and_the_other_card(on: str) -> None:
    plan = turbofit.plan("internvl2-2b", on=on)
    first = paint(plan_view(plan), short=True, width=200).splitlines()[0]
    (size,) = other_sizes(plan.machine.warnings)
    assert f"{size.taken} GB" in first
    assert size.spec in first
