"""Reasons name limits where there are any, and count in whole words."""

from __future__ import annotations

from itertools import pairwise

import pytest

import turbofit
from turbofit.report.painters.markdown import paint
from turbofit.report.views.plan_view import plan_view


def test_a_model_whose_images_have_no_limit_is_said_to_have_none() -> None:
    plan = turbofit.plan("llava-1.5-7b", on="1xrtx3090")
    assert not [why for why in plan.reasons if why.startswith("max_dynamic_patch")]
    text = paint(plan_view(plan))
    assert "max_dynamic_patch" not in text
    assert "1 image a request" in text
    for wrong in ("(s)", "1 tiles", "1 replicas", "1 images"):
        assert wrong not in text


def test_what_a_client_may_ask_beyond_a_plan_is_explained_in_both() -> None:
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090")
    assert plan.limits.max_dynamic_patch == 12
    (why,) = (why for why in plan.reasons if why.startswith("max_dynamic_patch"))
    assert why.startswith("max_dynamic_patch 12: the model's own")
    assert "detail: high is 24" in why
    told = turbofit.predict("internvl2-8b", on="1xrtx3090")
    assert told.limits.max_dynamic_patch == 24
    assert any("up to 24 tiles" in why and "own max_dynamic_patch is 12" in why
               for why in told.reasons)  # fmt: skip
    own = turbofit.predict("internvl2-8b", on="1xrtx3090", max_dynamic_patch=12)
    assert not any("detail: high" in why for why in own.reasons)


def test_a_plan_counts_on_nothing_of_prefix_caching() -> None:
    plan = turbofit.plan("internvl3-8b", on="1xrtx3090", enable_prefix_caching=True)
    (why,) = (why for why in plan.reasons if why.startswith("enable_prefix_caching"))
    assert "counts on nothing" in why
    off = turbofit.plan(
        "qwen2.5-vl-7b", on="1xrtx3090", engine="pytorch", enable_prefix_caching=True
    )
    assert any("switches prefix caching off" in text for text in off.warnings)


@pytest.mark.parametrize(
    ("model", "on", "limits"),
    [
        ("internvl2-8b", "4xrtx3090", [12, 6, 4, 1]),
        ("qwen2-vl-7b", "1xrtx3090", [12_845_056, 4_000_000, 2_000_000, 1_000_000, 500_000]),
    ],
)
def test_smaller_images_leave_more(model: str, on: str, limits: list[int]) -> None:
    plan = turbofit.plan(model, on=on)
    costs = plan.limit_costs
    assert [cost.limit for cost in costs] == limits
    assert plan.throughput is not None
    first = costs[0]
    assert first.limit == plan.limits.image_limit
    assert first.kv_tokens == plan.kv.total_tokens
    assert first.requests_per_second == plan.throughput.requests_per_second
    for larger, smaller in pairwise(costs):
        assert smaller.image_tokens < larger.image_tokens
        assert smaller.kv_tokens >= larger.kv_tokens
        assert smaller.requests_per_second > larger.requests_per_second
        assert smaller.seconds_to_first_token < larger.seconds_to_first_token


def test_a_plan_for_a_limit_serves_at_least_what_its_row_says() -> None:
    on = "2xrtx3090"
    row = turbofit.plan("qwen2-vl-7b", on=on).limit_costs[-2]
    option, value = row.option.split()
    assert option == "--max-pixels"
    plan = turbofit.plan("qwen2-vl-7b", on=on, max_pixels=int(value))
    assert plan.throughput is not None
    assert plan.throughput.requests_per_second >= row.requests_per_second
    assert plan.limits.max_pixels_per_image == row.limit


def test_there_is_no_table_where_no_limit_can_be_given() -> None:
    for model, asked in (
        ("qwen2.5-7b", {}),
        ("llava-1.5-7b", {}),
        ("internvl2-8b", {"images": 0}),
        ("internvl2-8b", {"image_size": (800, 600)}),
    ):
        assert not turbofit.plan(model, on="1xrtx3090", **asked).limit_costs


def reasons(model: str, on: str, **asked: object) -> list[tuple[int, int, str]]:
    plan = turbofit.plan(model, on=on, **asked)
    return [(c.tp, c.replicas, c.why_not) for c in plan.considered if c.fits]


def test_links_are_named_where_a_step_waits_for_them() -> None:
    said = reasons("llava-1.5-7b", "4xrtx3090")
    four = next(why for tp, replicas, why in said if (tp, replicas) == (4, 1) and "step" in why)
    assert "requests/s, not" in four
    assert "% of a step waits for links (through host memory, no peer access)" in four


def test_idle_cards_and_small_caches_are_named() -> None:
    said = {(tp, n): why for tp, n, why in reasons("qwen2.5-7b", "2xrtx3090")}
    assert said[1, 1].endswith((": GPUs stay idle", "requests at once, not 190"))
    short = [why for *_, why in reasons("internvl2-8b", "2xrtx3090:free=18GiB")]
    assert any("its cache holds a context of" in why for why in short)


def test_goals_speak_in_their_own_figures() -> None:
    latency = [why for *_, why in reasons("qwen2.5-7b", "2xrtx4090", goal="latency") if why]
    assert any(why.startswith("an answer in ") for why in latency)
    context = [why for *_, why in reasons("qwen2.5-7b", "2xrtx4090", goal="context") if why]
    assert any("KV tokens for one request, not" in why for why in context)
    assert all(reasons("qwen2.5-7b", "2xrtx4090")[i][2] for i in range(1, 5))
