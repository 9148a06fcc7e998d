"""A given concurrency is a promise: the caches of all engines together hold so many requests."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

import turbofit
from tests.sweep import sweep
from turbofit.cli.main import main
from turbofit.core.errors import DoesNotFitError
from turbofit.core.plan import Plan

pytestmark = pytest.mark.slow

#: A model, a machine, what else is asked, and more requests than it holds.
ASKED: list[tuple[str, str, dict[str, Any], int]] = [
    ("internvl3-8b", "1xrtx4090", {}, 1000),
    ("internvl3-8b", "1xrtx3090", {"engine": "pytorch"}, 64),
    ("internvl2-8b", "2xrtx3090", {"tp": 1, "replicas": 2, "context": 8192}, 64),
    ("internvl2-8b", "rtx3090+rtx4090", {"engine": "turbomind"}, 200),
    ("internvl2-26b", "4xrtx3090", {"tp": 4, "quant_policy": 8}, 500),
    ("qwen2-vl-7b", "1xrtx3090", {"images": 2, "max_pixels": 4_000_000}, 40),
    ("qwen2.5-7b", "1xl4", {"goal": "latency"}, 2000),
    ("internvl2-2b", "1xl4", {"least": True, "context": 8192}, 500),
    ("internvl2-8b", "1xl4", {"image_size": (896, 896), "budget": "20GiB"}, 500),
]


def at_once(plan: Plan) -> int:
    """What the caches hold of the request that the plan counts with."""
    size = plan.held.request_tokens
    return sum(one.kv.tokens // size for one in plan.each())


@pytest.mark.parametrize(("model", "on", "asked", "many"), sweep(ASKED))
def test_all_that_is_held_fits_and_one_more_does_not(
    model: str, on: str, asked: dict[str, Any], many: int
) -> None:
    over = turbofit.plan(model, on=on, concurrency=many, **asked)
    assert not over.fits
    held = over.held.requests
    size = over.held.request_tokens
    assert f"holds {held:,} of {many:,} requests of {size:,} tokens" in over.verdict
    assert f" --concurrency {many}" in over.verdict
    assert over.requests_at_once == held  # no batch takes memory for what never runs

    fits = turbofit.plan(model, on=on, concurrency=held, **asked)
    assert fits.fits
    assert fits.held.requests == fits.requests_at_once == held <= at_once(fits)
    one_more = turbofit.plan(model, on=on, concurrency=held + 1, **asked)
    assert not one_more.fits
    assert one_more.held.requests == held


def test_a_concurrency_that_is_held_takes_no_more_than_the_batch_that_turbofit_chose() -> None:
    free = turbofit.plan("internvl3-8b", on="1xrtx4090")
    asked = turbofit.plan("internvl3-8b", on="1xrtx4090", concurrency=free.requests_at_once)
    assert asked.settings == free.settings
    assert asked.kv == free.kv


def planned_with(change: str, model: str, on: str, **asked: Any) -> Plan:
    """The plan of a remedy, as a person would ask for it."""
    if change.startswith("use "):
        return turbofit.plan(change.split()[1], on=on, **asked)
    if " x NVIDIA " in change:
        count, _, card = change.partition(" x NVIDIA GeForce ")
        return turbofit.plan(model, on=f"{count}x{card.replace(' ', '').lower()}", **asked)
    if change.startswith("leave "):
        option = change.split()[1].removeprefix("--").replace("-", "_").removeprefix("no_")
        return turbofit.plan(model, on=on, **{**asked, option: None})
    words = shlex.split(change.partition(" (")[0])
    option = words[0].removeprefix("--").replace("-", "_")
    return turbofit.plan(model, on=on, **{**asked, option: int(words[1])})


@pytest.mark.parametrize(
    ("model", "on", "asked"),
    [
        ("internvl3-8b", "1xrtx3090", {"concurrency": 60}),
        ("internvl2-8b", "rtx3090+rtx4090", {"concurrency": 64, "max_dynamic_patch": 10}),
        ("qwen2-vl-7b", "1xrtx3090", {"concurrency": 12, "replicas": 1}),
        ("internvl2-8b", "1xrtx3090", {"concurrency": 20, "queue_images": False}),
    ],
)
def test_what_is_offered_holds_all_of_them(model: str, on: str, asked: dict[str, Any]) -> None:
    plan = turbofit.plan(model, on=on, **asked)
    assert not plan.fits
    offered = [one for one in plan.remedies if one.effect.startswith("fits")]
    assert len(offered) > 2
    kept = [one.change.startswith("--concurrency") for one in offered]
    assert sum(kept) == 1
    for one in offered:
        again = planned_with(one.change, model, on, **asked)
        assert again.fits, one
        if not one.change.startswith("--concurrency"):
            assert again.held.requests >= asked["concurrency"]
    for name in set(asked) - {"engine", "max_dynamic_patch"}:
        option = "no_queue_images" if name == "queue_images" else name
        left = turbofit.plan(model, on=on, **{**asked, name: None})
        assert (f"--{option.replace('_', '-')}" in plan.verdict) == left.fits


def test_the_image_limit_that_is_offered_is_the_largest_for_the_shape() -> None:
    plan = turbofit.plan("internvl3-8b", on="1xrtx4090", concurrency=64)
    change = plan.remedies[0].change
    limit = int(change.removeprefix("--max-dynamic-patch "))
    for tiles, fits in ((limit, True), (limit + 1, False)):
        asked = {"concurrency": 64, "max_dynamic_patch": tiles}
        assert turbofit.plan("internvl3-8b", on="1xrtx4090", **asked).fits is fits


def test_turbofit_does_not_lower_images_for_more_requests() -> None:
    """Image limit and context come first; that fewer tiles would hold more is a remedy."""
    plan = turbofit.plan("internvl3-8b", on="1xrtx4090", concurrency=64)
    assert plan.limits.max_dynamic_patch == 12
    assert plan.settings.session_len == 32768


def test_a_batch_that_was_given_bounds_what_runs() -> None:
    plan = turbofit.plan("internvl2-2b", on="rtx3090+t4", concurrency=20, max_batch_size=16)
    assert not plan.fits
    assert "with --max-batch-size 16 and --concurrency 20" in plan.verdict
    assert "max_batch_size 16 runs 16 of 20 at once" in plan.verdict
    alone = turbofit.plan("internvl2-8b", on="1xrtx3090", max_batch_size=300)
    assert alone.fits  # LMDeploy's option, and no promise


def test_a_request_is_no_longer_than_a_session() -> None:
    plan = turbofit.plan("qwen2.5-7b", on="1xl4", context=200, concurrency=8)
    assert plan.held.request_tokens == 200
    assert at_once(plan) >= 8


def test_the_engine_that_holds_them_is_chosen() -> None:
    asked = {"image_size": (4096, 4096), "queue_images": False}
    plan = turbofit.plan("qwen2-vl-7b", on="1xrtx3090", concurrency=4, **asked)
    first = turbofit.plan("qwen2-vl-7b", on="1xrtx3090", concurrency=4, engine="turbomind", **asked)
    assert plan.fits
    assert plan.engine.name == "pytorch"
    assert not first.fits
    assert any(one.change == "--engine pytorch" for one in first.remedies)


def test_host_memory_leaves_fewer_copies_that_hold_fewer() -> None:
    asked = {"on": "4xa100-80g,ram=9GiB", "engine": "turbomind"}
    plan = turbofit.plan("internvl2-8b", **asked, concurrency=1000)
    assert not plan.fits
    assert turbofit.plan("internvl2-8b", **asked, concurrency=plan.held.requests).fits


@pytest.mark.parametrize(
    ("on", "asked", "held"),
    [
        ("1xrtx4090", {}, 1),
        ("2xrtx4090", {}, 2),
        ("4xrtx4090", {"replicas": 2}, 2),
        ("4xrtx4090", {"tp": 4}, 1),
    ],
)
def test_each_copy_of_transformers_answers_one_request(
    on: str, asked: dict[str, int], held: int
) -> None:
    model = "llava-onevision-7b"
    plan = turbofit.plan(model, on=on, concurrency=4, **asked)
    assert plan.engine.name == "transformers"
    assert not plan.fits
    assert f"it answers {held} of 4 requests at once" in plan.verdict
    assert plan.held.requests == held
    assert plan.remedies
    assert turbofit.plan(model, on=on, concurrency=held, **asked).fits
    whole = turbofit.plan(model, on="4xrtx4090", concurrency=4)
    assert whole.fits
    assert whole.parallel.replicas == 4


def test_a_prediction_says_how_many_are_held_and_goes_by_what_lives() -> None:
    asked = {"on": "1xrtx4090", "session_len": 8192}
    few = turbofit.predict("internvl3-8b", concurrency=64, **asked)
    assert few.fits
    assert few.held.requests < 64
    assert f"it holds {few.held.requests} of 64 at once: the others wait" in few.verdict
    all_of_them = turbofit.predict("internvl3-8b", concurrency=6, **asked)
    assert "it holds 6 of 6 at once" in all_of_them.verdict
    dies = turbofit.predict("internvl3-8b", on="1xrtx3060", concurrency=6)
    assert dies.held.requests == 0
    assert "holds" not in dies.verdict


@pytest.mark.parametrize("command", ["plan", "serve"])
def test_the_command_line_ends_with_3_where_too_few_are_held(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "internvl3-8b", "--on", "1xrtx4090", "--concurrency", "1000"]
    words += ["--engine", "turbomind"]
    assert main([*words, "--dry-run"] if command == "serve" else words) == 3
    told = capsys.readouterr()
    said = " ".join((told.out + told.err).split())
    assert "with --concurrency 1000: the cache holds 34 of 1,000 requests of 3,840 tokens" in said


def test_a_pipeline_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(DoesNotFitError, match="holds 34 of 1,000 requests") as caught:
        turbofit.pipeline("internvl3-8b", on="1xrtx4090", engine="turbomind", concurrency=1000)
    assert caught.value.hint.startswith("--concurrency 34: fits")
