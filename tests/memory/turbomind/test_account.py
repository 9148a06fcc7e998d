"""The account as a whole: identities that every ledger keeps, the largest ratio, and refusals."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import Case, launch_on
from turbofit.core.errors import UsageError
from turbofit.core.units import MIB
from turbofit.machine.kernels.census import Census, released
from turbofit.memory.account import EngineLaunch
from turbofit.memory.turbomind.account import (
    Turbomind,
    _communicator_problems,
    missing_kernels,
)
from turbofit.memory.turbomind.weights import load_constants, temporary_bytes
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(
    ("model", "units", "seen", "options"),
    [
        ("qwen2-vl-2b", 65536, 19_865, {"cache_max_entry_count": 0.127, "max_batch_size": 20}),
        ("qwen2.5-vl-7b", 65536, 80_091, {"cache_max_entry_count": 0.919, "max_batch_size": 46}),
        ("internvl2-8b", 13, 80_153,
         {"cache_max_entry_count": 0.968, "max_batch_size": 119, "max_prefill_token_num": 4096}),
    ],
)  # fmt: skip
def test_no_forecast_is_under_what_an_h100_held(model, units, seen, options):
    """``seen``: MiB of the card by NVML after the worst cases (bench/gpu/README.md, An H100)."""
    launch = launch_on("1xh100", model, units=units, session_len=32768, **options)
    (ledger,) = Turbomind("0.18").account(launch).ledgers_at(options["cache_max_entry_count"])
    assert seen < ledger.peak / MIB < seen + 400


@pytest.mark.parametrize(
    ("model", "tp", "staging", "error"),
    [
        ("qwen2-vl-7b", 1, 3120, 9), ("qwen2-vl-7b", 2, 2600, 7), ("qwen2-vl-2b", 1, 1338, 4),
        # Of a padded vocabulary the embedding, lm_head raw and padded, each in pages of its own.
        ("internvl2-8b", 2, 3 * 724, 1),
    ],
)  # fmt: skip
def test_staging_as_torch_measured_it(model, tp, staging, error):
    """Peaks of torch's own allocator on pretend GPUs, MiB; the first GPU stages the load."""
    first, *others = Case(model, tp).account().ledgers_at(0.5)
    held = sum(t.bytes for t in first.terms if t.phase in ("before", "context", "weights"))
    assert (first.load_peak - held) / MIB == pytest.approx(staging, abs=error)
    assert all(first.load_peak > ledger.load_peak for ledger in others)


def test_a_card_before_ampere_pays_for_the_cast():
    """723 MiB: lm_head's copy while a bf16 checkpoint becomes float16."""
    for step, pages in ((2, 2), (None, 32)):
        account = Case("internvl2-8b", step=step).account(dtype="float16")
        terms = {t.term: t.bytes for t in account.ledgers_at(0.8)[0].terms}
        assert terms["load_temporaries"] / MIB == pytest.approx(723, abs=pages)
        assert terms["load_temporaries.returned"] == -terms["load_temporaries"]


def test_weights_and_what_waits_with_them_fill_whole_steps_of_one_pool():
    """More than that would be given back though the cache had never been smaller by it."""
    account = Case("internvl2-8b-awq").account(dtype="float16")
    ledger = account.ledgers_at(0.8)[0].terms
    weights = [t for t in ledger if t.phase == "weights"]
    step = account.constants.pool_granularity
    assert sum(t.bytes for t in weights if t.term != "load_temporaries") % step == 0
    assert sum(t.bytes for t in weights) % step == 0
    settings = Case("internvl2-8b-awq").settings(dtype="float16")
    raw = temporary_bytes(resolve_model("internvl2-8b-awq"), settings, account.constants, (8, 6))
    live = raw + sum(t.bytes for t in weights if "." in t.term and "rounding" not in t.term)
    assert 0 <= sum(t.bytes for t in weights) - live < step


@pytest.mark.parametrize(
    ("model", "on", "asked", "message"),
    [
        ("internvl2-8b", "1xrtx3090", {"cache_block_seq_len": 16}, "needs a multiple of 32"),
        ("internvl2-2b", "1xt4", {"cache_block_seq_len": 96}, "needs a multiple of 64"),
        ("internvl2-8b-awq", "1xrtx3090", {"model_format": "hf"}, "are stored in awq"),
        ("internvl2-8b", "1xrtx3090", {"model_format": "fp8"}, "stored in bfloat16, which is hf"),
        ("internvl2-8b", "1xrtx3090", {"cache_block_seq_len": 96}, None),
        ("internvl2-2b", "1xt4", {"cache_block_seq_len": 128}, None),
        ("internvl2-8b-awq", "1xrtx3090", {"model_format": "awq"}, None),
        ("internvl2-8b", "1xrtx3090", {"model_format": "hf"}, None),
    ],
)
def test_what_cannot_be_meant_is_refused(model, on, asked, message):
    for call in (turbofit.plan, turbofit.predict):
        if message is None:
            settings = call(model, on=on, engine="turbomind", **asked).engines[0].settings
            assert all(getattr(settings, name) == value for name, value in asked.items())
        else:
            with pytest.raises(UsageError, match=message):
                call(model, on=on, engine="turbomind", **asked)


BASE = {"max_batch_size": 8, "session_len": 4096}


@pytest.fixture(scope="module")
def census() -> Census:
    found = released((0, 18, 0))
    assert found is not None
    return found


@pytest.mark.parametrize(("ranks", "aborts"), [(8, False), (9, True)])
@pytest.mark.parametrize("communicator", ["cuda-ipc", "native"])
def test_its_own_communicators_join_eight_ranks(
    communicator: str, ranks: int, aborts: bool
) -> None:
    launch = launch_on("16xa100-80g", "internvl2-8b")
    settings = replace(launch.settings, tp=ranks, communicator=communicator)
    launch = replace(launch, settings=settings, gpus=launch.machine.gpus[:ranks])
    said = "".join(_communicator_problems(launch))
    assert ("takes at most 8 GPUs" in said) is aborts


def missing(census: Census, model: str, on: str, **settings: object) -> str | None:
    return kernel_problem(launch_on(on, model, **BASE, **settings), census)


def kernel_problem(launch: EngineLaunch, census: Census) -> str | None:
    return next(missing_kernels(launch, census, load_constants()), None)


@pytest.mark.parametrize(
    ("model", "on", "dtype", "said"),
    [
        ("internvl2-8b-awq", "1xrtx5090", "float16", "int4 weights with float16"),
        ("internvl2-8b-awq", "1xb200", "float16", "all 80 are empty functions"),
        ("mixtral-8x7b", "1xb200", "bfloat16", "experts in bfloat16"),
        ("internvl2-8b", "1xt4", "bfloat16", "attention kernel for bfloat16"),
        ("gpt-oss-20b", "1xrtx5090", "bfloat16", "mxfp4 weights with bfloat16"),
        ("gpt-oss-20b", "1xv100-32g", "float16", "with sinks, which stay in the checkpoint's"),
        ("gpt-oss-20b-bf16", "1xa100-80g", "float16", "no attention in float16 with sinks"),
        ("internvl2-8b", "1xrtx5090", "bfloat16", None),
        ("internvl2-8b-awq", "1xrtx3090", "float16", None),
        ("internvl2-8b-awq", "1xv100-16g", "float16", None),
        ("qwen3-30b-a3b", "1xh100", "bfloat16", None),
        ("qwen2-vl-7b", "1xb200", "bfloat16", None),
        ("gpt-oss-120b", "1xh100", "bfloat16", None),
    ],
)
@pytest.mark.parametrize("quant_policy", [0, 4, 8])
def test_pairs_with_code_and_without(census, model, on, dtype, said, quant_policy):
    problem = missing(census, model, on, dtype=dtype, quant_policy=quant_policy)
    assert problem is None if said is None else said in str(problem)


def test_a_card_of_a_generation_without_code_or_of_an_unknown_one(census: Census) -> None:
    launch = launch_on("1xb200", "internvl2-8b", **BASE)
    new = replace(launch.gpus[0], name="NVIDIA B300", compute_capability=(10, 3))
    found = kernel_problem(replace(launch, gpus=(new,)), census)
    assert str(found).startswith("no code at all for NVIDIA B300 (compute capability 10.3)")
    unread = replace(launch, gpus=(replace(new, compute_capability="NA"),))
    assert kernel_problem(unread, census) is None
    # Of an unknown capability all that are assumed must have code.
    assert missing(census, "internvl2-8b-awq", "24GB", dtype="float16") is None
    told = missing(census, "internvl2-8b-awq", "24GB:sm=12.0", dtype="float16")
    assert "24 GB card (compute capability 12.0)" in str(told)
    older = replace(census, architectures=("80", "86", "89"))
    assert "24 GB card (compute capability 9.0)" in str(missing(older, "internvl2-8b", "24GB"))
