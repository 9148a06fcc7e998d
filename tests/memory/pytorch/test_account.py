"""The PyTorch engine's account against what that engine did on pretend GPUs.

The figures were seen with LMDeploy 0.18, torch 2.12.1 and expandable segments at tp 1, Ray's fixed
segments at tp 2 (bench/rehearsal/PYTORCH.md is of the same): MiB by torch's own allocator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.memory.conftest import launch_on
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.account import Pytorch, PytorchAccount
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.weights import load_constants, weight_classes
from turbofit.memory.start_outcome import outcome_at
from turbofit.model.source import resolve_model

CONSTANTS = load_constants()
ENGINE = Pytorch("0.18")


class Seen(NamedTuple):
    """One rehearsal: tensors of the weights, then what was live above what stayed afterwards.

    ``prompt`` are tokens of the image case, where they were fewer than a prefill's.
    """

    model: str
    tp: int
    weights: float
    text: float
    vision: float = 0.0
    units: int = 0
    prefill: int = 8192
    context: int = 32768
    prompt: int | None = None


SEEN = [
    Seen("qwen2.5-7b", 1, 14525.6, 932.5),
    Seen("llama-3.1-8b", 1, 15316.5, 836.5, context=41024),
    Seen("qwen2-vl-7b", 1, 15814.5, 932.9, 2827.9, 65536),
    Seen("qwen2-vl-7b", 1, 15814.5, 233.5, 353.8, 8192, prefill=2048),
    Seen("internvl3-8b-hf", 1, 15152.7, 932.5, 904.8, 26),
    Seen("internvl3-8b", 1, 15152.7, 932.5, 437.4, 13, prompt=3382),
    Seen("qwen2.5-vl-7b", 1, 15816.1, 932.9, 2721.9, 65536, context=30336),
    Seen("qwen2-vl-2b", 1, 4213.3, 429.0, 2764.0, 65536),
    Seen("qwen2-vl-2b", 2, 2363.5, 288.7, 2124.9, 65536),
    Seen("qwen2-vl-7b", 2, 8991.1, 636.7, 2188.9, 65536),
    Seen("internvl3-8b-hf", 2, 8615.2, 636.5, 630.7, 26),
]


@pytest.mark.parametrize("seen", SEEN, ids=lambda seen: f"{seen.model}-tp{seen.tp}-{seen.units}")
class TestAgainstTheEngine:
    def test_weights_to_the_mib(self, seen: Seen) -> None:
        held = sum(weight_classes(resolve_model(seen.model), seen.tp).values()) / MIB
        # Over where the projector is sharded too, as in the hf format of InternVL.
        assert seen.weights - 2 <= held <= seen.weights * 1.0035

    def test_prefill_never_under(self, seen: Seen) -> None:
        work = activations(seen)
        size = work.prefill(Prefill(tokens=seen.prefill, context=seen.context)) / MIB
        assert seen.text <= size <= seen.text * 1.03 + 4

    def test_images_never_under(self, seen: Seen) -> None:
        if not seen.units:
            pytest.skip("text only")
        model = resolve_model(seen.model)
        tokens = seen.prompt or max(seen.prefill, model.image_rule.unit_tokens(seen.units))
        forward = Prefill(tokens=tokens, context=seen.context, units=seen.units)
        size = activations(seen).prefill(forward) / MIB
        # Within 2 % of a 24 GB card.
        assert seen.vision <= size <= seen.vision + 0.02 * 24576 + 1


def activations(seen: Seen) -> Activations:
    settings = Settings(tp=seen.tp, max_prefill_token_num=seen.prefill, max_batch_size=8)
    return Activations(resolve_model(seen.model), settings, CONSTANTS)


def account(
    name: str | Model = "qwen2-vl-7b",
    on: str | Machine = "1xrtx3090",
    free: int | None = None,
    **settings: Any,
) -> PytorchAccount:
    options = {"max_batch_size": 8, **settings}
    launch = launch_on(on, name, units=None, margin=256, free=free, **options)
    return PytorchAccount(launch, CONSTANTS)


def problem(model: str | Model, **options: Any) -> str | None:
    """What the engine refuses of these options."""
    return ENGINE.problem(launch_on("1xa100-80g", model, **options))


def tp_problem(model: Model, tp: int) -> str | None:
    return ENGINE.tp_problem(model, tp)


@pytest.mark.parametrize(
    ("name", "free", "ratio", "batch", "blocks"),
    [
        # `num_gpu_blocks` as the engine logged it, at its own defaults.
        ("qwen2-vl-7b", 7930, 0.8, 128, 1252),
        ("qwen2-vl-7b", 7930, 0.99, 128, 1549),
        ("qwen2-vl-2b", 19492, 0.8, 128, 7791),
        ("internvl3-8b-hf", 8672, 0.8, 128, 1423),
        ("qwen2.5-0.5b", 22964, 0.8, 128, 21883),
        ("llava-1.5-7b", 10458, 0.8, 128, 248),
    ],
)
def test_blocks_are_the_engine_s_own(
    name: str, free: int, ratio: float, batch: int, blocks: int
) -> None:
    one = account(name, free=free * MIB, max_batch_size=batch)
    assert one.region_at(ratio) == blocks * one.block_bytes
    assert one.tokens_at(ratio) == (blocks - 2) * 64


def test_a_block_count_is_taken_as_it_is() -> None:
    one = account(num_gpu_blocks=500)
    assert one.region_at(0.1) == one.region_at(0.9) == 500 * one.block_bytes
    assert not account(num_gpu_blocks=5000).fits_at(0.5)


def test_quantised_caches_hold_scales_and_zeros() -> None:
    plain, eight, four, fp8 = (account(quant_policy=policy) for policy in (0, 8, 4, 16))
    rows = 64 * 4 * 28 * 2  # tokens, KV heads, layers, keys and values
    assert plain.block_bytes == rows * 128 * 2
    assert eight.block_bytes == rows * (128 + 4)
    assert four.block_bytes == rows * (64 + 4)
    assert fp8.block_bytes == rows * 128
    # Keys of 4 bits with two numbers, values of 2 bits with one.
    assert account(quant_policy=42).block_bytes == rows // 2 * (64 + 4 + 32 + 2)


def test_turboquant_rotates_queries_and_outputs() -> None:
    def prefill(policy: int) -> int:
        one = account("llama-2-7b", quant_policy=policy, max_prefill_token_num=8192)
        return next(term.bytes for term in one.transients if term.term == "text_prefill")

    assert prefill(42) > prefill(4) == prefill(0)


def test_too_little_for_sixteen_blocks_is_told_as_the_engine_acts() -> None:
    one = account("internvl2-8b", on="1xrtx3090:free=19GiB")
    ratio = next(r / 1000 for r in range(1, 999) if one.tokens_at(r / 1000) > 0)
    fate = outcome_at(one, ratio)
    assert fate.kind == "hang"
    assert "No enough gpu memory for kv cache" in fate.text


def test_the_page_stays_healthy_where_an_image_kills_it() -> None:
    fate = outcome_at(account(), 0.97)
    assert fate.kind == "request"
    assert "/health stays 200" in fate.text
    assert fate.term == "vision_forward"


def test_ray_s_workers_leave_more_between_their_blocks() -> None:
    two = account(on="2xrtx3090", tp=2)
    own = account(on="2xrtx3090", tp=2, distributed_executor_backend="mp")
    assert max(t.bytes for t in own.transients) < max(t.bytes for t in two.transients)


def test_short_sessions_meet_in_one_forward() -> None:
    """LLaVA-1.5-7B, sessions of 4096 in prefills of 8192: eight images with 270 tokens of text each
    held 606.2 MiB at once on pretend GPUs, where one session's longest prompt held 365.6."""
    one = account("llava-1.5-7b", max_prefill_token_num=8192, session_len=4096)
    sizes = {term.term: term.bytes / MIB for term in one.transients}
    assert sizes["text_prefill"] >= 606.2
    assert 606.2 <= sizes["vision_forward"] <= 606.2 + 0.02 * 24576
    alone = account("llava-1.5-7b", max_prefill_token_num=8192, session_len=4096, max_batch_size=1)
    (prefill,) = [term.bytes / MIB for term in alone.transients if term.term == "text_prefill"]
    assert 365.6 <= prefill <= 365.6 * 1.1 + 24
