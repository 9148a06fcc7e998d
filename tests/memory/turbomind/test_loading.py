"""What loading holds, beside what the 0.18.0 binary held on pretend GPUs."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.model import Quantization
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.turbomind.pool import Forward, PoolModel, device_buffers
from turbofit.memory.turbomind.weights import load_constants, temporary_bytes
from turbofit.model.presets import preset_model


def _settings(tp: int, dtype: str = "bfloat16", batch: int = 384) -> Settings:
    return Settings(
        tp=tp,
        dtype=dtype,
        cache_max_entry_count=0.8,
        max_prefill_token_num=8192,
        max_batch_size=batch,
        session_len=32768,
        quant_policy=0,
    )


@pytest.mark.parametrize(
    ("model", "tp", "capability", "dtype", "mib"),
    [
        ("mixtral-8x7b", 1, (8, 0), "bfloat16", 448),
        ("mixtral-8x7b", 4, (8, 0), "bfloat16", 112),
        ("mixtral-8x7b", 1, (9, 0), "bfloat16", 224),
        ("mixtral-8x7b", 1, (7, 0), "float16", 448),
        ("mixtral-8x7b", 1, (12, 0), "bfloat16", 448),
        ("qwen3-30b-a3b", 1, (8, 0), "bfloat16", 12),
        ("qwen3-30b-a3b", 2, (8, 0), "bfloat16", 6),
        ("qwen3-30b-a3b", 1, (9, 0), "bfloat16", 6),
        ("qwen3-8b", 1, (9, 0), "bfloat16", 0),
    ],
)
def test_an_expert_is_repacked_at_16_bits_too(model, tp, capability, dtype, mib):
    settings = _settings(tp, dtype)
    held = temporary_bytes(preset_model(model), settings, load_constants(), capability)
    assert held == mib * MIB


@pytest.mark.parametrize(("stored", "tp", "mib"), [
    ("float32", 1, 2079), ("float32", 2, 1039.5), ("float16", 1, 1039.5), ("bfloat16", 1, 0),
])  # fmt: skip
def test_a_head_that_is_cast_waits_as_it_is_stored(stored, tp, mib):
    """Seen on pretend GPUs: free memory was read with 2,079 MiB less where 32 bits are stored."""
    model = replace(preset_model("qwen2.5-7b"), dtype=stored)
    assert temporary_bytes(model, _settings(tp), load_constants()) == mib * MIB


@pytest.mark.parametrize(
    ("model", "held"), [("qwen3-30b-a3b", 5_497_856), ("mixtral-8x7b", 549_888)]
)
def test_routing_is_set_aside_for_a_whole_forward(model, held):
    lines = device_buffers(preset_model(model), _settings(1), load_constants(), 40 * MIB)
    routing = {name: size for name, size, _ in lines}["expert_routing"]
    assert 0 <= held - routing < 7 * 512  # seven arrays, each up to its 512 bytes


@pytest.mark.parametrize(
    ("capability", "batch", "seen"), [((8, 0), 384, 540.19), ((9, 0), 1024, 472.50)]
)
def test_experts_hold_the_routers_scores(capability, batch, seen):
    pool = PoolModel(
        preset_model("qwen3-30b-a3b"), _settings(1, batch=batch), load_constants(), capability
    )
    tokens = 8192 + batch
    assert 0 <= pool.peak(Forward(tokens=tokens, context=tokens)) / MIB - seen < 0.1


@pytest.mark.parametrize(("tp", "seen"), [(1, 531.10), (2, 410.63)])
def test_a_shared_expert_has_an_output_beside_the_others(tp, seen):
    """Four layers of a Qwen2-MoE with 32 experts of 256 channels, warmed up on pretend GPUs."""
    model = preset_model("qwen3-30b-a3b")
    moe = replace(model.text.moe, layers=4, experts=32, intermediate=256, shared_intermediate=5632)
    text = replace(model.text, layers=4, head_dim=64, moe=moe)
    pool = PoolModel(replace(model, text=text), _settings(tp, batch=32), load_constants())
    warm_up = Forward(tokens=8224, context=8224, first_layer=True)
    assert 0 <= pool.peak(warm_up) / MIB - seen < 0.1


@pytest.mark.parametrize(
    ("name", "tp", "batch", "seen"),
    [
        ("qwen2.5-7b", 1, 32, 294.65), ("llama-3.1-8b", 1, 32, 322.25),
        ("llama-3.1-8b", 2, 64, 161.75), ("qwen3-32b", 1, 64, 518.02),
    ],
)  # fmt: skip
def test_fp8_products_on_hopper_are_fused_and_quantised(name, tp, batch, seen):
    """A warm-up on pretend H100s, in MiB."""
    packed = Quantization(method="fp8", bits=8, group_size=128)
    model = replace(preset_model(name), quantization=packed)
    pool = PoolModel(model, _settings(tp, batch=batch), load_constants(), (9, 0))
    tokens = 8192 + batch
    assert 0 <= pool.peak(Forward(tokens=tokens, context=tokens)) / MIB - seen < 0.1
