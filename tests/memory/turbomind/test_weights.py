"""TurboMind's weights beside what its binary held on pretend GPUs, and their paddings."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.model import Quantization
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.turbomind.weights import (
    expert_width,
    ffn_width,
    lm_head_rows,
    load_constants,
    loading_extra,
    temporary_bytes,
    weight_classes,
)
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model

CONSTANTS = load_constants()
MODEL = resolve_model("glm-4.7-flash")
AWQ = Quantization(method="awq", bits=4, group_size=128)


@pytest.mark.parametrize(
    ("intermediate", "tp", "quantization", "width"),
    [
        (29568, 8, None, 29568),  # Qwen2-VL-72B: held unpadded by 0.18
        (18944, 4, None, 18944),
        (8960, 4, AWQ, 9216),  # whole groups on every rank
        (14336, 1, AWQ, 14336),
    ],
)
def test_mlp_is_padded_to_whole_kernel_blocks(intermediate, tp, quantization, width):
    assert ffn_width(intermediate, tp, quantization, CONSTANTS) == width
    # lm_head is padded only where it is split.
    text = resolve_model("internvl2-8b").text
    assert (lm_head_rows(text, 1), lm_head_rows(text, 4)) == (92553, 92576)


@pytest.mark.parametrize(
    ("tp", "capability", "width"),
    [
        (1, (8, 6), 2880), (4, (8, 6), 2944), (8, (8, 9), 3072), (2, (9, 0), 2944),
        (4, (9, 0), 3072),
    ],
)  # fmt: skip
def test_experts_are_padded_to_their_kernels_blocks(tp, capability, width):
    """Of mxfp4 32 channels on every card but Hopper's 64; of 16 bits Hopper takes any."""
    packed = (2880, tp, resolve_model("gpt-oss-20b").quantization, CONSTANTS, capability)
    assert (expert_width(*packed), expert_width(2880, 4, None, CONSTANTS, (9, 0))) == (width, 2880)
    assert expert_width(2880, 4, None, CONSTANTS, (7, 0)) == 2880
    assert expert_width(2880, 4, None, CONSTANTS, (8, 0)) == 2944
    # 768 channels at tp 4 are 192 a rank on a pretend H100, whole groups of int4 elsewhere.
    assert expert_width(768, 4, AWQ, CONSTANTS, (8, 0)) == 1024
    assert expert_width(768, 4, AWQ, CONSTANTS, (9, 0)) == 768


def test_hopper_repeats_the_scales_of_large_groups():
    """Seen on a pretend H100: groups of 32 and of 128 take the same there, not so on an A100."""
    model = resolve_model("llama-3.1-8b")
    packed = [
        replace(
            model, quantization=Quantization(method="compressed-tensors", bits=4, group_size=size)
        )
        for size in (128, 32)
    ]
    large, small = (weight_classes(one, 1, CONSTANTS, (9, 0)) for one in packed)
    assert large == small
    assert large["mlp"] == model.text.layers * 3 * 4096 * 14336 * (16 + 2.5) / 32
    loading = [loading_extra(one, Settings(tp=1), CONSTANTS, (9, 0)) for one in packed]
    assert loading[0] == loading[1] > 0
    large, small = (weight_classes(one, 1, CONSTANTS) for one in packed)
    assert small["mlp"] > 1.08 * large["mlp"]


def settings_of(tp: int, dtype: str = "bfloat16", batch: int = 384) -> Settings:
    return Settings(
        tp=tp, dtype=dtype, cache_max_entry_count=0.8, max_prefill_token_num=8192,
        max_batch_size=batch, session_len=32768, quant_policy=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "tp", "capability", "dtype", "mib"),
    [
        ("mixtral-8x7b", 1, (8, 0), "bfloat16", 448),
        ("mixtral-8x7b", 4, (8, 0), "bfloat16", 112),
        ("mixtral-8x7b", 1, (9, 0), "bfloat16", 224),
        ("mixtral-8x7b", 1, (7, 0), "float16", 448),
        ("qwen3-30b-a3b", 1, (9, 0), "bfloat16", 6),
        ("qwen3-8b", 1, (9, 0), "bfloat16", 0),
    ],
)
def test_an_expert_is_repacked_at_16_bits_too(model, tp, capability, dtype, mib):
    held = temporary_bytes(preset_model(model), settings_of(tp, dtype), CONSTANTS, capability)
    assert held == mib * MIB


@pytest.mark.parametrize(("stored", "tp", "mib"), [
    ("float32", 1, 2079), ("float32", 2, 1039.5), ("float16", 1, 1039.5), ("bfloat16", 1, 0),
])  # fmt: skip
def test_a_head_that_is_cast_waits_as_it_is_stored(stored, tp, mib):
    """Seen on pretend GPUs: free memory was read with 2,079 MiB less where 32 bits are stored."""
    model = replace(preset_model("qwen2.5-7b"), dtype=stored)
    assert temporary_bytes(model, settings_of(tp), CONSTANTS) == mib * MIB


@pytest.mark.parametrize(("tp", "mib"), [(1, 58_318), (2, 29_288)])
def test_weights_are_the_engines_in_whole_pages(tp: int, mib: int) -> None:
    held = sum(weight_classes(MODEL, tp, CONSTANTS).values()) / MIB
    assert mib - 2 < held <= mib


SMALL = resolve_model("qwen3.5-4b")


def test_weights_are_the_checkpoints_and_the_tied_head_again() -> None:
    head = SMALL.text.vocab * SMALL.text.hidden
    held = sum(weight_classes(SMALL, 1, CONSTANTS).values()) - (SMALL.parameters + head) * 2
    assert 0 <= held < 64 << 10  # the driver rounds up what is small
    # Ranks share heads. On each is a norm, and what decays and biases are rounded up by.
    one, four = (weight_classes(SMALL, tp, CONSTANTS)["delta"] for tp in (1, 4))
    whole = SMALL.text.delta.layers * 3 * 512
    assert (four - whole) * 4 == one - whole
