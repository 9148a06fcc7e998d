"""The account beside what torch reserved for the real model code: figures of docs/fallback.md.

Rehearsed on pretend GPUs with torch 2.12.1 for CUDA and Transformers 5.17, bfloat16, sdpa, with
expandable segments; MiB, without the CUDA context.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.transformers.test_account import forecast, text_model
from turbofit.core.model import MoeDims
from turbofit.core.units import MIB
from turbofit.model.presets import preset_model

LLAVA = text_model(layers=32, hidden=4096, heads=32, kv_heads=32, intermediate=11008, vocab=32064)
ONEVISION = text_model(
    layers=28, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocab=152064, qkv_bias=True
)
MISTRAL = text_model(layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocab=32064)
QWEN3_MOE = text_model(
    layers=4, hidden=2048, heads=32, kv_heads=4, intermediate=6144, vocab=151936, qk_norm=True,
    moe=MoeDims(experts=128, experts_per_token=8, intermediate=768, layers=4),
)  # fmt: skip


# Prompt and answer, images, vision units; weights and reserved at the peak.
@pytest.mark.parametrize(
    ("model", "tokens", "images", "units", "weights", "reserved"),
    [
        ("qwen2-vl-2b", 2726, 1, 10752, 4213.3, 4810),
        ("qwen2-vl-2b", 16422, 1, 65536, 4213.3, 7672),
        ("qwen2-vl-2b", 8196, 0, 0, 4213.3, 5030),
        ("qwen2-vl-2b", 32704, 0, 0, 4213.3, 7332),
        ("qwen2-vl-7b", 2726, 1, 10752, 15814.5, 16466),
        ("qwen2-vl-7b", 8196, 0, 0, 15814.5, 17488),
        ("qwen2-vl-7b", 32698, 1, 65536, 15814.5, 22870),
        ("qwen2.5-vl-7b", 32698, 1, 65536, 15816.1, 23026),
        ("qwen2.5-omni-7b", 16388, 1, 65536, 17043.4, 20966),
        ("qwen2.5-omni-7b", 25600, 1, 65536, 17043.4, 22888),
        ("qwen2.5-omni-3b", 32768, 1, 65536, 8978.5, 13420),
        ("internvl3-8b-hf", 32768, 1, 13, 15152.7, 21888),
        (LLAVA, 4004, 0, 0, 13472.4, 15926),
        (ONEVISION, 16388, 0, 0, 15345.8, 18728),
        (MISTRAL, 16388, 0, 0, 14432.4, 18544),
        (QWEN3_MOE, 8004, 0, 0, 5941.0, 7488),
    ],
)
def test_never_under(model, tokens, images, units, weights, reserved):
    model = preset_model(model) if isinstance(model, str) else model
    peak, held = forecast(model, (tokens, images, units))
    beside, seen = (peak - held) / MIB, reserved - weights
    # What weights round up to is among the reserved bytes, so that it is charged here too.
    rounding = 64 + (576 if model.text.moe else 0)
    assert seen <= beside + rounding <= 1.45 * seen + rounding


def windowed(architecture="MistralForCausalLM", window=4096, **dims):
    """Two layers, and the bytes that torch had allocated beside their weights."""
    dims = {"layers": 2, "vocab": 32000, "kv_heads": 2, "hidden": 1024, "heads": 8, **dims}
    text = text_model(**dims)
    more = {"sliding_window": window} if window else {}
    return replace(text, text=replace(text.text, architecture=architecture, **more))


SMALL = windowed(intermediate=3584)
LARGE = windowed(hidden=4096, heads=32, kv_heads=8, intermediate=14336)
QWEN2_MOE = windowed(
    "Qwen2MoeForCausalLM", 0, intermediate=512, qkv_bias=True,
    moe=MoeDims(
        experts=4, experts_per_token=2, intermediate=64, layers=2, shared_intermediate=64
    ),
)  # fmt: skip


# With torch 2.13 and Transformers 5.17: allocated at the peak beside the weights, MiB; a length
# that is no multiple of 16 costs a copy of the mask more.
@pytest.mark.parametrize(
    ("model", "tokens", "allocated"),
    [
        (SMALL, 4094, 126.0), (SMALL, 4096, 142.1), (SMALL, 8192, 324.3), (SMALL, 8197, 436.8),
        (SMALL, 16384, 1032.5), (SMALL, 16391, 1513.7), (SMALL, 24576, 2124.7),
        (LARGE, 8192, 1060.3), (LARGE, 16391, 2249.5), (LARGE, 24576, 3564.7),
        (QWEN2_MOE, 8197, 301.4), (QWEN2_MOE, 16391, 801.4),
    ],
)  # fmt: skip
def test_the_mask_of_a_sliding_window_is_charged(model, tokens, allocated):
    peak, weights = forecast(model, (tokens, 0, 0))
    beside = (peak - weights) / MIB
    assert allocated <= beside
    if tokens % 16:
        assert beside <= 1.35 * allocated
