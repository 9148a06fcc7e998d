"""A plan's short answer, its capacity, and engines that differ."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

import turbofit
from tests.report.documents import planned
from turbofit.core.errors import TurbofitError
from turbofit.core.messages import BEYOND, OWN_CODE, QUEUED
from turbofit.core.plan import Plan
from turbofit.core.units import two_digits
from turbofit.model.presets import known_presets
from turbofit.report.painters.terminal import paint
from turbofit.report.views.plan_view import plan_view

_NAMES = sorted(known_presets())
SPECS = (
    ("internvl2-8b", "4xrtx3090"),
    ("qwen2-vl-7b", "2xrtx4090"),
    ("internvl2-8b", "rtx3090+rtx4090"),
    ("llava-1.5-7b", "1xl4:free=19GiB"),
    ("qwen2.5-7b", "1xrtx3090"),
    ("internvl2-26b", "1xrtx3060"),
)


#: The most lines of the first answer, on a terminal of 80 columns.
MOST_LINES = 20


def is_a_first_answer(plan: Plan) -> None:
    """Verdict, promise, settings by LMDeploy's names, the bar and turbofit's command."""
    text = paint(plan_view(plan), short=True)
    assert len(text.splitlines()) <= MOST_LINES, text
    words = " ".join(text.split())
    assert plan.verdict in words
    # What does not fit is no promise.
    assert (f"{plan.promise.context:,} tokens" in words) or not plan.fits
    assert ("tokens in all" in words) <= plan.fits
    if plan.backend.of_lmdeploy:
        assert "settings cache_max_entry_count " in words
        assert f"tp {plan.tp} x {plan.replicas}" in words
        assert f"max_batch_size {plan.engines[0].settings.max_batch_size}" in words or plan.engines
    assert words.count("turbofit serve ") == (1 if plan.fits else 0)
    assert "api_server" not in words


@pytest.mark.parametrize("on", ["1xrtx3090", "4xrtx3090", "1xh100"])
@pytest.mark.parametrize(
    "names", [_NAMES[::24], pytest.param(_NAMES, marks=pytest.mark.exhaustive)]
)
def test_the_first_answer_of_every_model(names: list[str], on: str) -> None:
    plans = []
    for name in names:
        with suppress(TurbofitError):  # no engine runs it on this card
            plans.append(turbofit.plan(name, on=on))
    assert len(plans) > len(names) / 2
    for plan in plans:
        is_a_first_answer(plan)


@pytest.mark.parametrize(("model", "on"), SPECS)
def test_the_first_answer_of_unlike_cards_and_shared_ones(model: str, on: str) -> None:
    is_a_first_answer(turbofit.plan(model, on=on))


def test_a_lower_image_limit_is_offered_where_it_serves_clearly_more() -> None:
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090")
    first = next(cost for cost in plan.limit_costs if cost.limit < 12)
    times = first.requests_per_second / plan.throughput.requests_per_second
    assert times >= 1.5
    assert f"smaller {first.option}: {two_digits(times)} times the requests" in told(plan)
    assert " smaller " not in told(turbofit.plan("llava-1.5-7b", on="1xrtx3090"))


def told(plan: Plan) -> str:
    return " ".join(paint(plan_view(plan), short=True).split())


def test_a_first_token_says_of_how_many_images_it_is() -> None:
    for images, said in ((1, " s of 1920x1080"), (4, " s of 4 images of 1920x1080")):
        plan = turbofit.plan("internvl2-2b", on="1xrtx3090", images=images)
        text = paint(plan_view(plan), short=True)
        assert said in text[text.index("first token") :]


def test_a_plan_that_holds_only_in_a_queue_hands_out_no_command_without_one() -> None:
    plan = turbofit.plan("qwen2-vl-7b", on="2xrtx4090")
    assert QUEUED in plan.warnings
    assert "turbofit serve qwen2-vl-7b --images 1 --context 32768" in told(plan)
    whole = paint(plan_view(plan))
    assert "LMDeploy alone does not keep this plan" in whole
    assert "api_server" in whole


def test_what_is_always_so_and_the_usual_size_of_a_card_are_for_the_whole_text() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="rtx4090+rtx3080")
    assert "rtx4090 was read as the 24 GB card" in paint(plan_view(plan))
    assert "was read as" not in told(plan)
    assert any(BEYOND in text for text in plan.warnings)
    assert BEYOND not in told(plan)
    own_code = turbofit.plan("internvl2-2b", on="1xV100")
    assert OWN_CODE in own_code.warnings
    assert OWN_CODE not in told(own_code)


@pytest.mark.parametrize(
    ("on", "said"),
    [("24GB", "24GB has no preset"), ("a100-80g:mig=3g.40gb", "was read as a MIG slice")],
)
def test_what_all_figures_rest_on_is_in_the_short_text(on: str, said: str):
    assert said in told(turbofit.plan("internvl2-2b", on=on))


@pytest.mark.parametrize(
    ("model", "options", "engine", "why"),
    [
        ("internvl3-8b", {}, "turbomind", None),
        # Each engine takes another share of what is free.
        ("internvl3-8b", {"cache_max_entry_count": 0.95}, "pytorch",
         "pytorch: with --cache-max-entry-count 0.950 turbomind does not"),
        ("smolvlm2", {}, "transformers", "transformers: TurboMind 0.18 has no encoder for"),
    ],
)  # fmt: skip
def test_the_engine_stands_in_the_short_answer_and_why_it_is_not_the_usual_one(
    model: str, options: dict[str, Any], engine: str, why: str | None
) -> None:
    text = told(turbofit.plan(model, on="1xrtx4090", **options))
    assert f" with {engine} fits: " in text
    assert (" engine " + (why or "") in text) == (why is not None)


def test_the_cache_is_counted_in_whole_blocks_and_requests_of_one_cache() -> None:
    plan = planned("mixed cards")
    size, each = 13 * 256 + 512, [one.kv.tokens for one in plan.engines]
    assert each[0] != each[1]
    held = f"{plan.kv_tokens:,} tokens: {sum(tokens // size for tokens in each)} requests of"
    assert f"KV cache {held} {size:,}, or " in told(plan)
    assert ": 1 request of 9,341, or 1 of" in paint(plan_view(planned("fallback")))
    assert "KV cache" not in told(planned("does not fit"))


@pytest.mark.parametrize(
    ("model", "on", "holds"), [("qwen3-vl-8b", "4090", 8), ("internvl2-26b-awq", "rtx3090", 0)]
)
def test_where_few_are_held_a_smaller_limit_that_holds_more_is_named(model, on, holds) -> None:
    plan = turbofit.plan(model, on=on)
    assert plan.promise.requests < 8
    text = paint(plan_view(plan), short=True)
    (cost, *_) = [
        cost for cost in plan.limit_costs
        if cost.limit < plan.promise.image_limit and cost.requests_at_once >= holds
    ]  # fmt: skip
    assert f"{cost.option}: {cost.requests_at_once} at once" in text
    assert len(text.splitlines()) <= 20
