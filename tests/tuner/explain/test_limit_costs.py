"""What common image limits leave, on the plan's own GPUs."""

from __future__ import annotations

from itertools import pairwise

import pytest

import turbofit


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
