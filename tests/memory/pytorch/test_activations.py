"""The PyTorch engine's forwards beside those on pretend GPUs, in MiB by torch's allocator."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.memory.conftest import cut
from tests.memory.pytorch.test_account import CONSTANTS
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.activations import Activations, Prefill, activations_of
from turbofit.memory.pytorch.weights import (
    weight_classes,
)
from turbofit.model.source import resolve_model


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
def test_weights_and_forwards_are_the_engine_s_and_never_under(seen: Seen) -> None:
    model = resolve_model(seen.model)
    held = sum(weight_classes(model, seen.tp).values()) / MIB
    # Over where the projector is sharded too, as in the hf format of InternVL.
    assert seen.weights - 2 <= held <= seen.weights * 1.0035
    settings = Settings(tp=seen.tp, max_prefill_token_num=seen.prefill, max_batch_size=8)
    work = Activations(model, settings, CONSTANTS)
    size = work.prefill(Prefill(tokens=seen.prefill, context=seen.context)) / MIB
    assert seen.text <= size <= seen.text * 1.03 + 4
    if seen.units:
        tokens = seen.prompt or max(seen.prefill, model.image_rule.unit_tokens(seen.units))
        forward = Prefill(tokens=tokens, context=seen.context, units=seen.units)
        # Within 2 % of a 24 GB card.
        assert seen.vision <= work.prefill(forward) / MIB <= seen.vision + 0.02 * 24576 + 1


@pytest.mark.parametrize(
    ("model", "tokens", "context", "seen", "more"),
    [
        (cut("gpt-oss-20b-bf16", 2), 2048, 34_816, 470.4, 42),
        (cut("glm-4.5-air", 3), 4096, 36_864, 939.7, 84),
        (cut("deepseek-moe-16b", 3), 4000, 36_768, 624.1, 56),
        # Its kernels are picked where neither a residual nor a sum is alive yet.
        (cut("phi-3.5-moe", 2), 8192, 8192, 1180.6, 131),
        (cut("deepseek-v2-lite", 5, packed=False), 8192, 32_768, 1006.88, 10),
        (cut("glm-4.7-flash", 5, packed=False), 8192, 32_768, 834.63, 8),
        (cut("deepseek-v3", 4, 16, packed=False), 8192, 32_768, 3140.50, 31),
        # Logits of this forward and of the one before; or of this one, beside a long prompt.
        (cut("minicpm3-4b", 2), 4096, 12_000, 1187.76, 4),
        (cut("minicpm3-4b", 2), 1024, 29_760, 647.62, 4),
    ],
)
def test_a_prefill_holds_what_the_engine_held(model, tokens, context, seen, more):
    work = activations_of(model, Settings(max_batch_size=16), CONSTANTS)
    paid = work.prefill(Prefill(tokens=tokens, context=context)) / MIB
    assert seen <= paid <= seen + more
