"""A concurrency that is asked for is promised."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

import turbofit
from tests.sweep import sweep
from turbofit.core.plan import Plan
from turbofit.core.units import round_up

pytestmark = pytest.mark.slow

#: A model, a machine, what else is asked, and more requests than it holds.
ASKED: list[tuple[str, str, dict[str, Any], int]] = [
    ("phi-3.5-vision", "1xrtx4060ti", {"cache_block_seq_len": 128}, 50),  # 1,293 tokens, 11 blocks
    ("internvl3-8b", "1xrtx4090", {}, 1000),
    ("internvl3-8b", "1xrtx3090", {"engine": "pytorch"}, 64),
    ("internvl2-8b", "2xrtx3090", {"tp": 1, "replicas": 2, "context": 8192}, 64),
    ("internvl2-8b", "rtx3090+rtx4090", {"engine": "turbomind"}, 200),
    ("internvl2-8b", "4xa100-80g,ram=9GiB", {"engine": "turbomind"}, 1000),  # for fewer copies
    ("internvl2-26b", "4xrtx3090", {"tp": 4, "quant_policy": 8}, 500),
    ("qwen2-vl-7b", "1xrtx3090", {"images": 2, "max_pixels": 4_000_000}, 40),
    ("qwen2.5-7b", "1xl4", {"goal": "latency"}, 2000),
    ("internvl2-2b", "1xl4", {"least": True, "context": 8192}, 500),
    ("internvl2-8b", "1xl4", {"image_size": (896, 896), "budget": "20GiB"}, 500),
]


def at_once(plan: Plan) -> int:
    """What the caches hold of the request that the plan counts with, in whole blocks."""
    size = round_up(plan.promise.request_tokens, plan.engines[0].settings.cache_block_seq_len)
    return sum(one.kv.tokens // size for one in plan.engines)


@pytest.mark.parametrize(("model", "on", "asked", "many"), sweep(ASKED, 8))
def test_all_that_is_held_fits_and_one_more_does_not(
    model: str, on: str, asked: dict[str, Any], many: int
) -> None:
    over = turbofit.plan(model, on=on, concurrency=many, **asked)
    assert not over.fits
    held = over.promise.requests
    size = over.promise.request_tokens
    assert f"holds {held:,} of {many:,} requests of {size:,} tokens" in over.verdict
    assert f" --concurrency {many}" in over.verdict
    assert over.requests_at_once == held  # no batch takes memory for what never runs

    fits = turbofit.plan(model, on=on, concurrency=held, **asked)
    assert fits.fits
    assert fits.promise.requests == fits.requests_at_once == held <= at_once(fits)
    one_more = turbofit.plan(model, on=on, concurrency=held + 1, **asked)
    assert not one_more.fits
    assert one_more.promise.requests == held


def test_no_batch_is_planned_that_ends_an_engine() -> None:
    """Three requests at once were a refusal, whose hint led to another one."""
    plan = turbofit.plan("cogvlm-17b", on="2xrtx3090", concurrency=3)
    batch = "max_batch_size 1, the most that LMDeploy survives, runs 1 of 3 at once"
    assert plan.verdict.endswith(f"with --concurrency 3: {batch}")
    assert (plan.promise.requests, plan.engines[0].settings.max_batch_size) == (1, 1)
    assert plan.remedies[0].change == "--concurrency 1"
    assert "max_batch_size 1: with more at once a fault of LMDeploy ends the engine" in plan.reasons
    # Nor does another hint: the number of engines is turbofit's on more cards, the batch nobody's.
    asked = {"model": "cogvlm-17b", "on": "4xrtx3090", "concurrency": 3, "replicas": 2}
    more = turbofit.plan(**asked).remedies[-1].change
    assert more.endswith("RTX 3090, and leave --replicas out")
    assert planned_with(more, **asked).fits
    batched = turbofit.plan(**asked, max_batch_size=1)
    assert "--concurrency 2" in [remedy.change for remedy in batched.remedies]


def test_a_concurrency_that_is_held_takes_no_more_than_the_batch_that_turbofit_chose() -> None:
    free = turbofit.plan("internvl3-8b", on="1xrtx4090")
    asked = turbofit.plan("internvl3-8b", on="1xrtx4090", concurrency=free.promise.requests)
    assert asked.requests_at_once == free.promise.requests < free.requests_at_once
    assert asked.engines[0].kv == free.engines[0].kv


def planned_with(change: str, model: str, on: str, **asked: Any) -> Plan:
    """The plan of a remedy, as a person would ask for it."""
    if change.startswith("use "):
        return turbofit.plan(change.split()[1], on=on, **asked)
    if " x NVIDIA " in change:
        cards, _, left_out = change.partition(", and leave ")
        count, _, card = cards.partition(" x NVIDIA GeForce ")
        asked |= {name: None for name in ("tp", "replicas") if name in left_out}
        return turbofit.plan(model, on=f"{count}x{card.replace(' ', '').lower()}", **asked)
    if change.startswith("leave "):
        option = change.split()[1].removeprefix("--").replace("-", "_").removeprefix("no_")
        return turbofit.plan(model, on=on, **{**asked, option: None})
    words = shlex.split(change.partition(" (")[0])
    option = words[0].removeprefix("--").replace("-", "_")
    return turbofit.plan(model, on=on, **{**asked, option: int(words[1].rstrip(","))})


@pytest.mark.parametrize(
    ("model", "on", "asked"),
    [
        ("internvl3-8b", "1xrtx3090", {"concurrency": 60}),
        pytest.param(
            "internvl2-8b", "rtx3090+rtx4090", {"concurrency": 64, "max_dynamic_patch": 10},
            marks=pytest.mark.exhaustive,
        ),
        ("qwen2-vl-7b", "1xrtx3090", {"concurrency": 12, "replicas": 1}),
        ("internvl2-8b", "1xrtx3090", {"concurrency": 20, "queue_images": False}),
    ],
)  # fmt: skip
def test_what_is_offered_holds_all_of_them(model: str, on: str, asked: dict[str, Any]) -> None:
    plan = turbofit.plan(model, on=on, **asked)
    assert not plan.fits
    offered = [one.change for one in plan.remedies if one.effect.startswith("fits")]
    assert len(offered) > 2
    assert sum(change.startswith("--concurrency") for change in offered) == 1
    for change in offered:
        again = planned_with(change, model, on, **asked)
        assert again.fits, change
        if not change.startswith("--concurrency"):
            assert again.promise.requests >= asked["concurrency"]
    for name in set(asked) - {"max_dynamic_patch"}:
        option = "no_queue_images" if name == "queue_images" else name
        left = turbofit.plan(model, on=on, **{**asked, name: None})
        assert (f"--{option.replace('_', '-')}" in plan.verdict) == left.fits


def test_images_are_not_lowered_and_the_limit_that_is_offered_is_the_largest() -> None:
    """Image limit and context come first; that fewer tiles would hold more is a remedy."""
    asked = {"model": "internvl3-8b", "on": "1xrtx4090", "concurrency": 64}
    plan = turbofit.plan(**asked)
    assert (plan.promise.limits.max_dynamic_patch, plan.engines[0].settings.session_len) == (
        12,
        32768,
    )
    limit = int(plan.remedies[0].change.removeprefix("--max-dynamic-patch "))
    for tiles, fits in ((limit, True), (limit + 1, False)):
        assert turbofit.plan(**asked, max_dynamic_patch=tiles).fits is fits


def test_a_batch_that_was_given_bounds_what_runs() -> None:
    plan = turbofit.plan("internvl2-2b", on="rtx3090+t4", concurrency=20, max_batch_size=16)
    assert not plan.fits
    assert "with --max-batch-size 16 and --concurrency 20" in plan.verdict
    assert "max_batch_size 16 runs 16 of 20 at once" in plan.verdict
    alone = turbofit.plan("internvl2-8b", on="1xrtx3090", max_batch_size=300)
    assert alone.fits  # LMDeploy's option, and no promise
    # A request is no longer than a session.
    short = turbofit.plan("qwen2.5-7b", on="1xl4", context=200, concurrency=8)
    assert short.promise.request_tokens == 200
    assert at_once(short) >= 8


def test_the_engine_that_holds_them_is_chosen() -> None:
    asked = {"image_size": (4096, 4096), "queue_images": False, "concurrency": 4}
    plan = turbofit.plan("qwen2-vl-7b", on="1xrtx3090", **asked)
    first = turbofit.plan("qwen2-vl-7b", on="1xrtx3090", engine="turbomind", **asked)
    assert (plan.fits, plan.backend.name, first.fits) == (True, "pytorch", False)
    assert any(one.change == "--engine pytorch" for one in first.remedies)


@pytest.mark.parametrize(
    ("on", "asked", "held"),
    [
        ("1xrtx4090", {}, 1),
        ("2xrtx4090", {}, 2),
        ("4xrtx4090", {"replicas": 2}, 2),
        ("4xrtx4090", {"tp": 4}, 1),
        ("4xrtx4090", {}, 4),
    ],
)
def test_each_copy_of_transformers_answers_one_request(on, asked, held) -> None:
    plan = turbofit.plan("llava-onevision-7b", on=on, concurrency=held, **asked)
    assert plan.backend.name == "transformers"
    assert plan.fits
    more = turbofit.plan("llava-onevision-7b", on=on, concurrency=held + 1, **asked)
    assert not more.fits
    assert f"it answers {held} of {held + 1} requests at once" in more.verdict
    assert more.promise.requests == held
    assert more.remedies


def test_a_prediction_says_how_many_are_held_and_goes_by_what_lives() -> None:
    asked = {"on": "1xrtx4090", "session_len": 8192}
    few = turbofit.predict("internvl3-8b", concurrency=64, **asked)
    assert few.fits
    assert few.promise.requests < 64
    assert f"it holds {few.promise.requests} of 64 at once: the others wait" in few.verdict
    dies = turbofit.predict("internvl3-8b", on="1xrtx3060", concurrency=6)
    assert dies.promise.requests == 0
    assert "holds" not in dies.verdict


MODEL, ON = "internvl2-8b", "4xrtx3090"
