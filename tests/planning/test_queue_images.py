"""Image requests that wait for each other, and images that fit the context."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
import turbofit.api
from tests.sweep import sweep
from turbofit.core.images import CrossRule
from turbofit.core.plan import Plan
from turbofit.gateway.limits.gate import UNSTATED
from turbofit.memory.account import VisionLoad
from turbofit.model.presets import known_presets, load_preset
from turbofit.planning.speed import counted_tokens
from turbofit.serving.plan_gateway import bounds_of

PAIRS = [("qwen2-vl-7b", "1xrtx3090"), ("internvl2-8b", "1xrtx3090"), ("qwen3-vl-8b", "1xa100-40g")]


def both(model: str, on: str, **options: object) -> list[Plan]:
    return [
        turbofit.plan(model, on=on, tp=1, replicas=1, queue_images=queued, **options)
        for queued in (False, True)
    ]


@pytest.mark.parametrize(("model", "on"), PAIRS)
def test_one_request_is_paid_for_and_the_cache_gets_the_rest(model: str, on: str) -> None:
    meeting, queued = both(model, on)
    limits = queued.promise.limits
    assert queued.engines[0].units_per_forward == limits.units_per_request
    assert limits.units_per_image == meeting.promise.limits.units_per_image  # clients lose nothing
    assert queued.engines[0].settings.session_len == meeting.engines[0].settings.session_len
    if meeting.engines[0].units_per_forward > queued.engines[0].units_per_forward:
        assert queued.engines[0].kv.tokens > meeting.engines[0].kv.tokens
    assert queued.workload.queue_images
    assert any("as you asked" in reason for reason in queued.reasons)
    assert any(one.fits for one in queued.considered)


def test_where_the_engine_may_evict_the_cache_decides_who_runs_beside_whom() -> None:
    """An evicted request's images are encoded again, beside those that were let through."""
    _, queued = both("qwen2-vl-7b", "1xrtx3090")
    assert bounds_of(queued).gate == queued.promise.limits.units_per_request
    assert (
        queued.engines[0].settings.max_batch_size * queued.engines[0].settings.session_len
        > queued.engines[0].kv.tokens
    )
    assert bounds_of(queued).engines[0].kv.tokens == queued.engines[0].kv.tokens
    assert bounds_of(queued).answer_tokens == queued.workload.unstated_answer == 1024
    _, roomy = both("qwen2-vl-7b", "1xrtx3090", context=18432, max_batch_size=4)
    assert bounds_of(roomy).engines[0].kv.tokens == UNSTATED
    assert bounds_of(roomy).answer_tokens == 0


def test_a_prediction_pays_for_one_too() -> None:
    asked = {"on": "1xrtx3090", "cache_max_entry_count": 0.5}
    assert not turbofit.predict("qwen2-vl-7b", **asked).fits
    assert turbofit.predict("qwen2-vl-7b", queue_images=True, **asked).fits


def test_where_the_cache_is_short_queueing_serves_more_and_is_as_wide_as_costs_nothing() -> None:
    chosen, without, forced = (
        turbofit.plan("internvl2-2b", on="1xl4:free=8GiB", queue_images=queue)
        for queue in (None, False, True)
    )
    assert chosen.engines[0].settings.session_len == without.engines[0].settings.session_len
    assert chosen.promise.limits.units_per_image == without.promise.limits.units_per_image
    served = [one.throughput.requests_per_second for one in (chosen, without)]
    assert served[0] > 2 * served[1]
    assert bounds_of(chosen).gate is not None
    assert bounds_of(without).gate is None
    assert any("the cache gets the rest" in reason for reason in chosen.reasons)
    assert forced.engines[0].units_per_forward == forced.promise.limits.units_per_request
    assert chosen.engines[0].units_per_forward > forced.engines[0].units_per_forward
    assert chosen.engines[0].settings.max_batch_size == forced.engines[0].settings.max_batch_size
    assert chosen.engines[0].settings.session_len == forced.engines[0].settings.session_len


@pytest.mark.parametrize(
    ("model", "on", "queues"),
    [
        ("internvl2-8b", "1xl4", True),
        ("qwen2.5-vl-7b", "1xrtx4090", True),
        ("internvl2-8b", "1xrtx3090", False),
        ("internvl3.5-8b", "1xrtx4090", False),
    ],
)
def test_a_queue_serves_more_even_of_those_who_state_no_length(
    model: str, on: str, queues: bool
) -> None:
    """They get 0.95 of what the others get where images wait, by the clock (docs/speed.md)."""
    chosen, without, forced = (
        turbofit.plan(model, on=on, queue_images=queue) for queue in (None, False, True)
    )
    assert (bounds_of(chosen).gate is not None) is queues
    rates = [one.throughput.requests_per_second for one in (without, forced)]
    assert rates[0] < rates[1]
    assert (rates[0] < 0.95 * rates[1]) is queues


@pytest.mark.parametrize("model", ["internvl2-8b", "qwen2-vl-7b"])
def test_where_there_is_cache_enough_nothing_queues(model: str) -> None:
    roomy = turbofit.plan(model, on="1xh100")
    assert bounds_of(roomy).gate is None
    assert roomy.workload.queue_images is None


#: A template, a question and the answer of the request that readiness asks.
TEXT = 256
#: Presets with images that are not another one's quantisation.
WITH_IMAGES = [
    name for name in known_presets()
    if load_preset(name).image_rule is not None and load_preset(name).base is None
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep(WITH_IMAGES, 16))
def test_images_fit_the_context_or_are_refused_by_name(name: str) -> None:
    for images in (2, 8):
        plan = turbofit.plan(name, on="8xb200", images=images)
        limits, context = plan.promise.limits, plan.engines[0].settings.session_len
        if not plan.fits:
            assert f"{images} images of the largest size are" in plan.verdict
            continue
        assert limits.images_per_request == images
        assert limits.units_per_request == images * limits.units_per_image
        assert limits.image_tokens_per_request + TEXT <= context
        assert isinstance(plan.model.image_rule, CrossRule) or images <= (
            limits.image_tokens_per_request
        )


@pytest.mark.slow
def test_the_limit_is_lowered_as_far_as_the_context_asks() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3090", images=4)
    assert plan.engines[0].settings.session_len == 32_768
    assert 31_000 < plan.promise.limits.image_tokens_per_request <= 32_768 - 1024


@pytest.mark.slow
def test_what_both_were_set_is_refused_with_what_would_do() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3090", images=4, max_pixels=12_845_056)
    assert not plan.fits
    assert "4 images of the largest size are 65,536 tokens" in plan.verdict
    changes = [remedy.change for remedy in plan.remedies if remedy.effect.startswith("fits")]
    assert changes[:2] == ["--images 1", "leave --max-pixels to turbofit"]
    assert not any("GPU" in remedy.change or "GeForce" in remedy.change for remedy in plan.remedies)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["turbomind", "pytorch", "transformers"])
def test_a_context_that_is_asked_for_is_kept_and_images_give_way(engine: str) -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xa100-80g", images=2, context=4096, engine=engine)
    assert plan.fits
    assert plan.engines[0].settings.session_len == 4096
    assert plan.promise.limits.image_tokens_per_request + TEXT <= 4096


def test_where_no_first_token_is_told_nothing_queues_unless_a_person_asks() -> None:
    """An answer in one piece would hold the next picture back until its end."""
    asked = {"model": "internvl2-8b", "on": "1xl4"}
    queued, older = turbofit.plan(**asked), turbofit.plan(**asked, lmdeploy="0.17")
    wanted = turbofit.plan(**asked, lmdeploy="0.17", queue_images=True)
    assert bounds_of(queued).gate is not None
    assert [bounds_of(plan).gate for plan in (older, wanted)] == [None, 13]


def test_where_images_wait_requests_without_a_stated_length_count_if_a_fifth_fewer_fit() -> None:
    largest = VisionLoad(units_per_image=13, images_per_request=1, tokens_per_request=13 * 256)
    photograph = replace(largest, tokens_per_request=9 * 256)
    loads = [largest, photograph, replace(largest, tokens_per_request=0)]
    assert [counted_tokens(load, 32768) for load in loads] == [3840, 2816, 512]
    waiting = [replace(load, units_per_forward=13) for load in loads]
    assert [counted_tokens(load, 32768) for load in waiting] == [3840, 3584, 1280]
    assert counted_tokens(waiting[1], 3000) == 3000
