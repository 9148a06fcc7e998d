"""Weights by class: what tensor parallelism splits, replicates, repeats and pads."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.model import Quantization
from turbofit.core.plan import Settings
from turbofit.memory.turbomind.weights import (
    expert_width,
    ffn_width,
    kv_heads_held,
    lm_head_rows,
    loading_extra,
    vision_tp,
    weight_classes,
)
from turbofit.model.source import resolve_model


def test_one_gpu_holds_the_checkpoint(constants):
    """InternVL2-8B has nothing padded at tp 1: two bytes a parameter."""
    model = resolve_model("internvl2-8b")
    assert sum(weight_classes(model, 1, constants).values()) == model.parameters * 2


def test_tied_embeddings_are_held_twice(constants):
    model = resolve_model("qwen2-vl-2b")
    assert model.text.tie_word_embeddings
    classes = weight_classes(model, 1, constants)
    assert classes["embedding"] == classes["lm_head"]


def test_attention_of_25_heads_is_replicated(constants):
    model = resolve_model("internvl2-26b")
    assert model.vision is not None
    assert vision_tp(model.vision, 4) == 1
    one, four = (weight_classes(model, tp, constants)["vision"] for tp in (1, 4))
    assert four > one / 2  # only the MLP is split


def test_kv_heads_are_repeated_beyond_their_number(constants):
    assert kv_heads_held(4, 8) == 8
    model = resolve_model("qwen2-vl-7b")
    split = [weight_classes(model, tp, constants)["attention"] * tp for tp in (1, 4)]
    assert split[1] >= split[0]


def test_lm_head_is_padded_only_where_it_is_split():
    text = resolve_model("internvl2-8b").text
    assert lm_head_rows(text, 1) == 92553
    assert lm_head_rows(text, 4) == 92576  # a multiple of 8 x 4


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
def test_mlp_is_padded_to_whole_kernel_blocks(constants, intermediate, tp, quantization, width):
    assert ffn_width(intermediate, tp, quantization, constants) == width


def test_four_bit_groups_cost_their_scales_and_zeros(constants):
    model = resolve_model("internvl2-8b")
    awq = resolve_model("internvl2-8b-awq")
    full, quarter = (weight_classes(m, 1, constants)["mlp"] for m in (model, awq))
    assert quarter == full // 4 + full // 2 // 128 * 4
    assert (
        weight_classes(awq, 1, constants)["vision"] == weight_classes(model, 1, constants)["vision"]
    )


def test_experts_are_counted_in_every_expert_layer(constants):
    """Mixtral-8x7B at 16 bits: 46.7 G parameters, all of them held."""
    model = resolve_model("mixtral-8x7b")
    held = sum(weight_classes(model, 1, constants).values())
    assert held == pytest.approx(model.parameters * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("tp", "capability", "width"),
    [
        (1, (8, 6), 2880), (4, (8, 6), 2944), (8, (8, 9), 3072), (2, (9, 0), 2944),
        (4, (9, 0), 3072),
    ],
)  # fmt: skip
def test_experts_are_padded_to_their_kernels_blocks(constants, tp, capability, width):
    """Of mxfp4 32 channels on every card but Hopper's 64; of 16 bits Hopper takes any."""
    model = resolve_model("gpt-oss-20b")
    packed = (2880, tp, model.quantization, constants, capability)
    assert expert_width(*packed) == width
    assert expert_width(2880, 4, None, constants, (9, 0)) == 2880
    assert expert_width(2880, 4, None, constants, (7, 0)) == 2880
    assert expert_width(2880, 4, None, constants, (8, 0)) == 2944


@pytest.mark.parametrize(("capability", "width"), [((8, 0), 1024), ((9, 0), 768)])
def test_int4_experts_are_padded_to_their_kernels_blocks(constants, capability, width):
    """768 channels at tp 4 are 192 a rank on a pretend H100, whole groups elsewhere."""
    assert expert_width(768, 4, AWQ, constants, capability) == width


def test_mxfp4_packs_experts_alone(constants):
    packed, whole = (resolve_model(f"gpt-oss-20b{kind}") for kind in ("", "-bf16"))
    held, full = (weight_classes(model, 1, constants) for model in (packed, whole))
    elements = 24 * 32 * 3 * 2880 * 2880
    saved = elements * 2 - elements * 17 // 32
    assert full.pop("mlp") - held.pop("mlp") == pytest.approx(saved, rel=1e-4)
    assert held == full


def test_text_only_models_have_no_vision_classes(constants):
    model = replace(resolve_model("internvl2-8b"), vision=None)
    assert not {"vision", "projector"} & set(weight_classes(model, 1, constants))


def test_layers_left_unpacked_are_counted_from_the_files(constants):
    """Files that hold 600 MiB more than packed layers would: the rest stays at 16 bits."""
    model = resolve_model("internvl2-8b-awq")
    extra = 600 << 20
    from_file = replace(
        model,
        weight_bytes=model.weight_bytes + extra,
        source=replace(model.source, sizes="file"),
    )
    assert weight_classes(from_file, 4, constants)["unpacked"] == extra // 4
    exact = replace(model, source=replace(model.source, sizes="file"))
    assert "unpacked" not in weight_classes(exact, 4, constants)


def test_hopper_repeats_the_scales_of_large_groups(constants):
    """Seen on a pretend H100: groups of 32 and of 128 take the same there, not so on an A100."""
    model = resolve_model("llama-3.1-8b")
    packed = [
        replace(
            model, quantization=Quantization(method="compressed-tensors", bits=4, group_size=size)
        )
        for size in (128, 32)
    ]
    large, small = (weight_classes(one, 1, constants, (9, 0)) for one in packed)
    assert large == small
    assert large["mlp"] == model.text.layers * 3 * 4096 * 14336 * (16 + 2.5) / 32
    loading = [loading_extra(one, Settings(tp=1), constants, (9, 0)) for one in packed]
    assert loading[0] == loading[1] > 0
    large, small = (weight_classes(one, 1, constants) for one in packed)
    assert small["mlp"] > 1.08 * large["mlp"]
