"""What TurboMind 0.18's wheel holds for a card, as a plan asks it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import launch_on
from turbofit.core.errors import NoKernelError
from turbofit.kernels.census import Census
from turbofit.kernels.released import released
from turbofit.memory.turbomind.account import missing_kernels

BASE = {"max_batch_size": 8, "session_len": 4096}


@pytest.fixture(scope="module")
def census() -> Census:
    found = released((0, 18, 0))
    assert found is not None
    return found


def missing(census: Census, model: str, on: str, **settings: object) -> str | None:
    return missing_kernels(launch_on(on, model, **BASE, **settings), census)


@pytest.mark.parametrize(
    ("model", "on", "dtype", "said"),
    [
        ("internvl2-8b-awq", "1xrtx5090", "float16", "int4 weights with float16"),
        ("internvl2-8b-awq", "1xb200", "float16", "all 80 are empty functions"),
        ("internvl2-8b-awq", "1xrtx3090", "bfloat16", "int4 weights with bfloat16"),
        ("mixtral-8x7b", "1xb200", "bfloat16", "experts in bfloat16"),
        ("qwen3-30b-a3b", "1xh100", "float16", "experts in float16"),
        ("internvl2-8b", "1xt4", "bfloat16", "attention kernel for bfloat16"),
        ("gpt-oss-20b", "1xrtx5090", "bfloat16", "mxfp4 weights with bfloat16"),
        ("gpt-oss-20b", "1xv100-32g", "float16", "with sinks, which stay in the checkpoint's"),
        ("gpt-oss-20b-bf16", "1xa100-80g", "float16", "no attention in float16 with sinks"),
    ],
)
def test_pairs_without_code(census: Census, model: str, on: str, dtype: str, said: str) -> None:
    assert said in str(missing(census, model, on, dtype=dtype))


@pytest.mark.parametrize(
    ("model", "on", "dtype"),
    [
        ("internvl2-8b", "1xrtx5090", "bfloat16"),
        ("internvl2-8b-awq", "1xrtx3090", "float16"),
        ("internvl2-8b-awq", "1xh100", "float16"),
        ("internvl2-8b-awq", "1xv100-16g", "float16"),
        ("qwen3-30b-a3b", "1xh100", "bfloat16"),
        ("mixtral-8x7b", "1xa100-80g", "bfloat16"),
        ("qwen2-vl-7b", "1xb200", "bfloat16"),
        ("gpt-oss-20b", "1xrtx3090", "bfloat16"),
        ("gpt-oss-120b", "1xh100", "bfloat16"),
    ],
)
@pytest.mark.parametrize("quant_policy", [0, 4, 8])
def test_pairs_with_code(
    census: Census, model: str, on: str, dtype: str, quant_policy: int
) -> None:
    assert missing(census, model, on, dtype=dtype, quant_policy=quant_policy) is None


def test_a_card_of_a_generation_without_code(census: Census) -> None:
    launch = launch_on("1xb200", "internvl2-8b", **BASE)
    new = replace(launch.gpus[0], name="NVIDIA B300", compute_capability=(10, 3))
    found = missing_kernels(replace(launch, gpus=(new,)), census)
    assert str(found).startswith("no code at all for NVIDIA B300 (compute capability 10.3)")
    unread = replace(launch, gpus=(replace(new, compute_capability="NA"),))
    assert missing_kernels(unread, census) is None


def test_of_an_unknown_capability_all_that_are_assumed_must_have_code(census: Census) -> None:
    assert missing(census, "internvl2-8b-awq", "24GB", dtype="float16") is None
    told = missing(census, "internvl2-8b-awq", "24GB:sm=12.0", dtype="float16")
    assert "24 GB card (compute capability 12.0)" in str(told)
    older = replace(census, architectures=("80", "86", "89"))
    assert "24 GB card (compute capability 9.0)" in str(missing(older, "internvl2-8b", "24GB"))


def test_the_engine_that_compiles_is_taken() -> None:
    plan = turbofit.plan("internvl2-8b-awq", on="1xrtx5090")
    assert (plan.fits, plan.engine.name) == (True, "pytorch")
    assert plan.reasons[0].startswith("engine pytorch: it compiles its kernels; ")


def test_an_engine_that_was_named_is_refused() -> None:
    with pytest.raises(NoKernelError) as caught:
        turbofit.plan("internvl2-8b-awq", on="1xrtx5090", engine="turbomind")
    assert caught.value.exit_code == 3
    assert caught.value.hint.startswith("--engine pytorch serves")


def test_cards_with_code_are_planned_for_beside_one_without() -> None:
    plan = turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx5090", engine="turbomind")
    assert plan.fits
    assert plan.parallel.groups == ((0,),)


def test_predict_says_that_it_does_not_run() -> None:
    prediction = turbofit.predict("internvl2-8b-awq", on="1xrtx5090")
    assert not prediction.fits
    assert "does not run: TurboMind of LMDeploy 0.18 has no GEMM kernel" in prediction.verdict
    old = turbofit.predict("internvl2-8b", on="1xrtx5090", lmdeploy="0.10.0")
    assert "LMDeploy 0.10.0 has no code at all" in old.verdict
