"""The context that a plan is content with, where a longer one would cost requests at once."""

from __future__ import annotations

import pytest

import turbofit


def test_a_longer_context_is_given_up_for_more_requests_at_once() -> None:
    plan = turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090")
    longer = turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", context=44_032)
    assert plan.settings.session_len == 32_768
    assert (longer.fits, longer.settings.session_len) == (True, 44_032)
    assert plan.kv.tokens > 1.3 * longer.kv.tokens
    held = [one.throughput.concurrent_requests for one in (plan, longer)]
    assert held == [3, 2]
    said = next(reason for reason in plan.reasons if reason.startswith("session_len"))
    assert "more images meet in a forward" in said
    assert "--context asks for more" in said


@pytest.mark.parametrize(
    ("model", "on"), [("qwen2.5-vl-7b", "1xa100-80g"), ("qwen2.5-vl-7b", "1xv100-32g")]
)
def test_where_it_costs_no_request_the_context_stays(model: str, on: str) -> None:
    plan = turbofit.plan(model, on=on)
    assert plan.settings.session_len > 32_768


def test_wishes_are_kept() -> None:
    for asked in ({"session_len": 40_960}, {"context": 40_960}):
        assert (
            turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", **asked).settings.session_len == 40_960
        )
    whole = turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", goal="context")
    assert whole.settings.session_len > 32_768
    text = turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", language_model_only=True)
    assert text.settings.session_len > 32_768
