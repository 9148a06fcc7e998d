"""The longest context is the one that halving finds, with fewer looks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import turbofit
from turbofit.tuner.search.sizing import CONTEXT_STEP, longest_held


def by_halving(holds, low: int, high: int) -> int:
    while high - low > CONTEXT_STEP:
        middle = (low + high) // 2 // CONTEXT_STEP * CONTEXT_STEP
        if middle <= low:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@given(
    room=st.integers(0, 200_000), cost=st.floats(0, 2), step=st.integers(1, 500),
    starts_to=st.integers(1024, 140_000), high=st.integers(1024, 131_072).map(lambda n: n & ~63),
)  # fmt: skip
def test_it_is_what_halving_finds(room, cost, step, starts_to, high) -> None:
    looks = []

    def held(context: int) -> int:
        """Fewer tokens in steps the longer the context is; none where the engine does not start."""
        looks.append(context)
        tokens = max(0, int(room - cost * context)) // step * step
        return tokens if context <= starts_to else 0

    low = 1024
    if held(low) < low or held(high) >= high:
        return
    looks.clear()
    assert longest_held(held, low, high) == by_halving(lambda n: held(n) >= n, low, high)


def test_two_looks_do_where_a_context_costs_little() -> None:
    looks = []

    def held(context: int) -> int:
        looks.append(context)
        return 20_000 - context // 1000

    assert longest_held(held, 1024, 32_768) == 19_968
    assert looks == [32_768, 19_968]


@pytest.mark.parametrize("on", ["1xrtx3090", "1xa100-80g", "1xv100-32g"])
def test_a_context_that_few_requests_miss_is_enough(on: str) -> None:
    plan = turbofit.plan("qwen2.5-vl-7b", on=on)
    assert plan.settings.session_len == 32_768
    said = next(reason for reason in plan.reasons if reason.startswith("session_len"))
    assert "more images can meet in a forward" in said
    assert "--context asks for more" in said
    longer = turbofit.plan("qwen2.5-vl-7b", on=on, context=44_032)
    assert (longer.fits, longer.settings.session_len) == (True, 44_032)


def test_a_longer_context_costs_requests_where_more_images_can_meet() -> None:
    plan, longer = (
        turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", context=context, queue_images=False)
        for context in (None, 44_032)
    )
    held = [one.throughput.concurrent_requests for one in (plan, longer)]
    assert held == [3, 2]


def test_images_that_need_more_get_what_they_need() -> None:
    plan = turbofit.plan("qwen2.5-vl-7b", on="1xa100-80g", images=3)
    tokens = plan.limits.image_tokens_per_request
    assert 32_768 < tokens < plan.settings.session_len < 2 * tokens


def test_wishes_are_kept() -> None:
    for asked in ({"session_len": 40_960}, {"context": 40_960}):
        assert (
            turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", **asked).settings.session_len == 40_960
        )
    whole = turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", goal="context")
    assert whole.settings.session_len > 32_768


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-8b"])
def test_no_batch_takes_memory_that_the_context_needs(model: str) -> None:
    plan = turbofit.plan(model, on="1xa10", goal="context")
    assert plan.settings.session_len <= plan.kv.tokens
