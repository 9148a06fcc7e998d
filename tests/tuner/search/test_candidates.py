"""What an evaluation is worth, and what a plan publishes of it."""

from __future__ import annotations

import pytest

import turbofit


@pytest.mark.parametrize("goal", ["throughput", "latency", "context"])
def test_the_score_is_the_goals_value_where_images_queue_or_are_lowered(goal: str) -> None:
    """The order of candidates was once carried by the same number: -3.28e+11 requests/s."""
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3060:free=7GiB", engine="turbomind", goal=goal)
    fitting = [one for one in plan.considered if one.fits]
    assert len(fitting) > 1
    assert all(0 < one.score < 1e6 for one in fitting)
    assert all(one.score == 0 for one in plan.considered if not one.fits)
    assert not any("e+" in one.why_not for one in plan.considered)
    chosen = plan.considered[0]
    if goal == "throughput":
        assert plan.throughput is not None
        assert chosen.score == pytest.approx(plan.throughput.requests_per_second, abs=1e-4)
    elif goal == "context":
        assert chosen.score == chosen.kv_tokens
    assert chosen.score == max(one.score for one in fitting)


def test_larger_images_come_before_speed() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3060:free=7GiB", engine="turbomind")
    assert plan.limits.max_pixels_per_image is not None
    smaller = turbofit.plan(
        "qwen2-vl-2b", on="1xrtx3060:free=7GiB", engine="turbomind",
        max_pixels=plan.limits.max_pixels_per_image // 2,
    )  # fmt: skip
    assert smaller.considered[0].score > plan.considered[0].score
