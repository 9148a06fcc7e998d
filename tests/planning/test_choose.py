"""The engine is the one that serves more of what was asked; what goes wrong with it is said."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.errors import NoKernelError, UsageError
from turbofit.core.model import Quantization
from turbofit.memory.engines import engine_named
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.search.search import search
from turbofit.report.painters.terminal import paint
from turbofit.report.views.plan_view import plan_view


def test_turbomind_stays_where_it_serves_all_that_was_asked() -> None:
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090")
    assert not any(reason.startswith("engine ") for reason in plan.reasons)
    assert {plan.backend.name, *(one.engine for one in plan.considered)} == {"turbomind"}


def test_the_other_engine_is_taken_where_turbomind_does_not_start() -> None:
    plan, alone, same = (
        turbofit.plan("qwen2.5-32b-awq", on="1xrtx4090", engine=engine)
        for engine in ("auto", "turbomind", "pytorch")
    )
    assert not alone.fits
    assert plan.fits
    assert plan.backend.name == "pytorch"
    lost = plan.considered[1]
    assert (lost.engine, lost.fits) == ("turbomind", False)
    assert "short" in lost.why_not
    assert lost.why_not in alone.verdict
    assert plan.reasons[0] == f"engine pytorch: turbomind does not fit: {lost.why_not}"
    assert (plan.engines[0].settings, plan.engines[0].kv) == (
        same.engines[0].settings,
        same.engines[0].kv,
    )


def test_the_other_engine_is_taken_where_turbomind_lowers_images() -> None:
    asked = {"model": "qwen2-vl-7b", "on": "1xl4:free=18.5GiB"}
    alone = [turbofit.plan(**asked, engine=engine) for engine in ("turbomind", "pytorch")]
    plan = turbofit.plan(**asked)
    served = [(one.fits, one.promise.limits.units_per_image) for one in alone]
    assert (plan.fits, plan.promise.limits.units_per_image) == max(served)
    # Served by LMDeploy's PyTorch engine on a pretend card.
    assert turbofit.plan("internvl2-26b-awq", on="1xrtx3090").backend.name == "pytorch"


def test_images_that_nobody_asked_for_change_the_engine_only_where_they_are_far_larger() -> None:
    given: dict[str, Any] = {"budget": "95%", "cache_max_entry_count": 0.5}
    plan, other = (
        turbofit.plan("qwen2-vl-7b", on="1x4090", **given, engine=engine)
        for engine in ("auto", "pytorch")
    )
    images = [one.promise.limits.image_tokens_per_request for one in (plan, other)]
    assert plan.backend.name == "turbomind"
    assert 0.99 * images[1] < images[0] < images[1]
    asked = turbofit.plan("qwen2-vl-7b", on="1x4090", **given, max_pixels=other.promise.image_limit)
    assert asked.backend.name == "pytorch"
    assert asked.promise.limits.image_tokens_per_request == images[1]


@pytest.mark.parametrize("model", ["qwen2-vl-7b", "internvl2-8b", "qwen2.5-7b"])
@pytest.mark.parametrize("on", ["1xrtx3090", "1xv100-32g", "2xrtx4090"])
def test_for_context_the_larger_cache_wins(model: str, on: str) -> None:
    plan, *alone = (
        turbofit.plan(model, on=on, goal="context", engine=name)
        for name in ("auto", "turbomind", "pytorch")
    )
    # Volta is too old for an engine that compiles with Triton to be chosen unasked.
    best = alone[0] if "v100" in on else max(alone, key=lambda one: one.engines[0].kv.tokens)
    assert (plan.backend.name, plan.engines[0].kv.tokens) == (
        best.backend.name,
        best.engines[0].kv.tokens,
    )


def test_old_cards_are_told_of_the_engine_and_not_given_it() -> None:
    plan = turbofit.plan("internvl3-14b", on="1xv100-32g")
    assert (plan.fits, plan.backend.name) == (False, "turbomind")
    (effect,) = [one.effect for one in plan.remedies if one.change == "--engine pytorch"]
    assert "if its Triton still compiles" in effect


@pytest.mark.parametrize(
    ("model", "asked", "helps"),
    [
        ("qwen3-30b-a3b", {"on": "1xrtx4090"}, True),
        ("qwen2-vl-72b", {"on": "4xa10", "session_len": 40_000, "goal": "context"}, False),
    ],
)
def test_transformers_is_a_remedy_where_it_fits(model, asked, helps):
    remedies = turbofit.plan(model, **asked).remedies
    effects = [one.effect for one in remedies if one.change == "--engine transformers"]
    there = turbofit.plan(model, engine="transformers", **asked)
    assert there.fits is helps
    assert len(effects) == helps
    if helps:
        assert "cpu" in there.engines[0].device_map.values()
        assert effects[0].endswith("with decoder layers in host memory")


@pytest.mark.parametrize(
    ("options", "told"),
    [({"eager_mode": True}, "--eager-mode"), ({"quant_policy": 42}, "--quant-policy 42")],
)
def test_an_option_of_the_pytorch_engine_alone_takes_it(options: dict[str, Any], told: str) -> None:
    plan = turbofit.plan("qwen2.5-7b", on="1xrtx4090", **options)
    assert (plan.fits, plan.backend.name) == (True, "pytorch")
    assert plan.reasons[0] == f"engine pytorch: it alone takes {told}"


def test_options_of_one_engine_bind_to_it() -> None:
    plan = turbofit.plan("qwen2.5-32b-awq", on="1xrtx4090", communicator="nccl")
    assert (plan.fits, plan.backend.name) == (False, "turbomind")
    assert turbofit.plan("qwen2.5-7b", on="1xrtx4090", quant_policy=8).backend.name == "turbomind"
    for asked in ({"model": "qwen2.5-7b", "engine": "turbomind"}, {"model": "gpt-oss-20b"}):
        with pytest.raises(UsageError, match="no option of the turbomind engine"):
            turbofit.plan(on="1xl40s", eager_mode=True, **asked)


def test_where_turbomind_has_no_kernels_the_answer_is_of_the_engine_that_compiles_its_own() -> None:
    for on, fits in (("1xrtx5090", False), ("4xrtx5090", True)):
        plan = turbofit.plan("mixtral-8x7b", on=on)
        assert (plan.backend.name, plan.fits) == ("pytorch", fits)
        assert "no GEMM kernel" in plan.reasons[0]
    alone = turbofit.plan("mixtral-8x7b", on="1xrtx5090")
    assert "4 x NVIDIA GeForce RTX 5090" in {one.change for one in alone.remedies}
    with pytest.raises(NoKernelError, match="no GEMM kernel") as caught:
        turbofit.plan("mixtral-8x7b", on="1xrtx5090", engine="turbomind")
    assert "another engine" in caught.value.hint


def test_what_always_dies_is_refused_with_what_to_do():
    request = resolve(PlanRequest(model="qwen2.5-7b", on="1xrtx3090"))
    weights = Quantization(method="fp8", bits=8, group_size=128)
    request = replace(request, model=replace(request.model, quantization=weights))
    with pytest.raises(UsageError) as caught:
        search(request, engine_named("turbomind", "0.16.0"))
    assert "No feasible kernel found" in caught.value.message
    assert "github.com/InternLM/lmdeploy/issues/4863" in caught.value.message
    assert "0.17" in caught.value.hint
    assert search(request, engine_named("turbomind", "0.17.0")).fits


def test_the_goal_latency_says_what_it_made_best_and_beside_which() -> None:
    plan = turbofit.plan("internvl3-8b", on="2xrtx3090", goal="latency")
    assert plan.tp == 2
    seconds = {shape.tp: 1 / shape.score for shape in reversed(plan.considered) if shape.fits}
    best = 1 / plan.considered[0].score
    assert best == min(seconds.values())
    text = f"256 tokens in {best:.1f} s; tp 1: {seconds[1]:.1f} s"
    assert text in plan.backend.reason
    assert text in " ".join(paint(plan_view(plan), short=True).split())
    assert "tokens in" not in turbofit.plan("internvl3-8b", on="2xrtx3090").backend.reason
