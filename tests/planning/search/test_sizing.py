"""The longest context, and what an evaluation is worth."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.errors import UsageError
from turbofit.core.units import MIB
from turbofit.memory.account import NO_IMAGES
from turbofit.planning.choose import choose, problem_of
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.search.sizing import Sizer


@pytest.mark.parametrize(
    ("held", "context"), [(4032, 4032), (19_968, 19_456), (20_480, 20_480), (1500, 1472)]
)
def test_a_context_is_rounded_where_that_costs_little(held: int, context: int) -> None:
    """3,072 of 4,032 tokens would lose a quarter."""
    sizer = SimpleNamespace(
        contexts=lambda: (1024, 32_768), state=SimpleNamespace(too_small=False),
        _tokens_held=lambda _context: held, vision_load=NO_IMAGES,
    )  # fmt: skip
    assert Sizer.session_len(sizer) == context


@pytest.mark.parametrize("on", ["1xrtx3090", "1xa100-80g", "1xv100-32g"])
def test_a_context_that_few_requests_miss_is_enough(on: str) -> None:
    plan = turbofit.plan("qwen2.5-vl-7b", on=on)
    assert plan.engines[0].settings.session_len == 32_768
    said = next(reason for reason in plan.reasons if reason.startswith("session_len"))
    assert "more images can meet in a forward" in said
    assert "--context asks for more" in said
    longer = turbofit.plan("qwen2.5-vl-7b", on=on, context=44_032)
    assert (longer.fits, longer.engines[0].settings.session_len) == (True, 44_032)


def test_a_longer_context_costs_requests_and_images_that_need_more_get_what_they_need() -> None:
    held = []
    for context in (None, 44_032):
        plan = turbofit.plan("qwen2.5-vl-7b", on="1xrtx4090", context=context, queue_images=False)
        held.append(plan.throughput.concurrent_requests)
    assert held == [2, 1]
    plan = turbofit.plan("qwen2.5-vl-7b", on="1xa100-80g", images=3)
    tokens = plan.promise.limits.image_tokens_per_request
    assert 32_768 < tokens < plan.engines[0].settings.session_len < 2 * tokens
    whole = turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", goal="context")
    assert whole.engines[0].settings.session_len > 32_768


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-8b"])
def test_no_batch_takes_memory_that_the_context_needs(model: str) -> None:
    plan = turbofit.plan(model, on="1xa10", goal="context")
    assert plan.engines[0].settings.session_len <= plan.engines[0].kv.tokens


@pytest.mark.parametrize("goal", ["throughput", "latency", "context"])
def test_the_score_is_the_goals_value_where_images_queue_or_are_lowered(goal: str) -> None:
    """The order of candidates was once carried by the same number: -3.28e+11 requests/s."""
    asked = {"on": "1xrtx3060:free=7GiB", "engine": "turbomind", "goal": goal}
    plan = turbofit.plan("qwen2-vl-2b", **asked)
    fitting = [one for one in plan.considered if one.fits]
    assert len(fitting) > 1
    assert all(0 < one.score < 1e6 for one in fitting)
    assert all(one.score == 0 for one in plan.considered if not one.fits)
    assert not any("e+" in one.why_not for one in plan.considered)
    assert plan.considered[0].score == max(one.score for one in fitting)


def test_a_lowered_plan_forecasts_the_images_that_it_takes() -> None:
    """It told the speed of the size that was asked for, which it does not take."""
    asked = {"on": "1xrtx4090", "images": 24, "engine": "turbomind"}
    lowered = turbofit.plan("internvl2-8b", **asked)
    limit = lowered.promise.limits.max_dynamic_patch
    alone = turbofit.plan("internvl2-8b", max_dynamic_patch=limit, **asked)
    assert lowered.engines[0].settings == alone.engines[0].settings
    assert lowered.throughput == alone.throughput
    assert lowered.considered[0].score == alone.considered[0].score


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
    "intermediate_size": 2624, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 4, "vocab_size": 32000, "torch_dtype": "float16",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
}  # fmt: skip


def test_what_no_degree_suits_is_said_by_its_reason(tmp_path: Path) -> None:
    """It was "no tensor-parallel degree suits … on 1 GPUs", with a hint to leave --tp out."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(UsageError, match="2624 channels are no whole groups of 128") as told:
        turbofit.plan(str(tmp_path), on="1xrtx3090")
    assert told.value.hint == "take other weights"


@pytest.mark.parametrize(
    "model", ["qwen2.5-vl-7b", "qwen2-vl-7b", "internvl2-8b", "internvl3.5-8b"]
)
@pytest.mark.parametrize("on", ["1xl4", "1xrtx3090", "1xrtx4090"])
def test_the_batch_is_for_photographs_and_text_and_takes_nothing(model: str, on: str) -> None:
    """As many rows as the largest images fill answered a third of the photographs a second."""
    asked = {"on": on, "enable_prefix_caching": False}  # else decided by the rate of each batch
    plan = turbofit.plan(model, **asked)
    (engine,), usual = plan.engines, plan.usual_image
    assert usual
    fewest = turbofit.plan(model, max_batch_size=plan.promise.requests, **asked)
    (least,) = fewest.engines
    assert plan.promise.requests == fewest.promise.requests
    # Where images wait, requests at once are counted by answers that state no length.
    waits = "queue" in str(plan.warnings)
    assert usual.requests_at_once > plan.promise.requests - waits
    assert engine.settings == replace(least.settings, max_batch_size=engine.settings.max_batch_size)
    assert (engine.kv, engine.units_per_forward) == (least.kv, least.units_per_forward)
    taken = [ledger.most for ledger in engine.ledgers]
    assert taken == [ledger.most for ledger in least.ledgers]
    assert fewest.usual_image
    gain = usual.requests_per_second / fewest.usual_image.requests_per_second
    assert gain > (1.3 if "qwen" in model else 0.99 if waits else 1.05)


def test_the_answer_says_how_many_photographs_and_how_many_of_the_largest() -> None:
    plan = turbofit.plan("qwen2.5-vl-7b", on="1xl4")
    assert plan.usual_image
    photographs = plan.usual_image.requests_at_once
    assert plan.promise.requests == 3 < photographs
    words = f"{photographs} requests at once of 1920x1080, {plan.promise.requests} of the largest"
    assert words in plan.verdict
    asked = turbofit.plan("qwen2.5-vl-7b", on="1xl4", concurrency=3)
    assert asked.requests_at_once == asked.promise.requests == 3


def test_rows_that_take_memory_are_not_added() -> None:
    """A delta net keeps states for each row, and the cache would be smaller."""
    plan = turbofit.plan("qwen3.5-9b", on="1xrtx4090")
    (engine,) = plan.engines
    batch = engine.settings.max_batch_size
    more = turbofit.plan("qwen3.5-9b", on="1xrtx4090", max_batch_size=batch + 16)
    assert more.engines[0].kv.tokens < engine.kv.tokens


def test_without_a_known_speed_the_rows_are_the_photographs_that_the_cache_holds() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xv100")
    assert plan.usual_image
    assert plan.throughput
    assert plan.throughput.requests_per_second is None
    assert plan.requests_at_once == plan.usual_image.requests_at_once > plan.promise.requests


def test_what_is_short_grows_with_what_is_taken_away() -> None:
    """Below 9,318 MiB no ratio fits; the margin still holds there, and the least cache does not."""
    free = (9400, 9340, 9318, 9300, 9240)
    fits = [
        choose(resolve(PlanRequest(model="minicpm3-4b", on=f"rtx3090:free={mib}MiB")))
        for mib in free
    ]
    short = [fit.best.short / MIB for fit in fits]
    assert short[0] == pytest.approx(554, abs=1)
    assert [mib + lacks for mib, lacks in zip(free, short, strict=True)] == pytest.approx(
        [free[0] + short[0]] * len(free), abs=1
    )
    for fit, lacks in zip(fits, short, strict=True):
        assert f"{lacks:.0f} MiB more" in problem_of(fit)


def test_with_less_memory_never_less_is_short() -> None:
    """Below 9,025 MiB the margin does not hold either."""
    asked = PlanRequest(model="minicpm3-4b", engine="turbomind", images=0)
    free = (9240, 9100, 9030, 9000, 8716)
    fits = [choose(resolve(asked.changed(on=f"rtx3090:free={mib}MiB"))) for mib in free]
    short = [fit.best.short for fit in fits]
    assert short == sorted(short)
    assert short[0] > 0
