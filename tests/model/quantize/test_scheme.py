"""How models are packed: groups, what stays in 16 bits, and which models are refused."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.model.presets import preset_model
from turbofit.model.quantize.scheme import packed_linears, packed_model, scheme_for


def in_16_bits(name: str, module: str) -> bool:
    """Whether compressed-tensors would leave a module alone: by its name, or by an expression."""
    return any(
        re.match(pattern.removeprefix("re:"), module) if ":" in pattern else pattern == module
        for pattern in scheme_for(preset_model(name)).ignore
    )


@pytest.mark.parametrize(
    ("model", "kept", "packed"),
    [
        (
            "qwen2.5-vl-7b",
            ["lm_head", "model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0"],
            ["model.language_model.layers.0.mlp.gate_proj"],
        ),
        (
            "internvl3-8b-hf",
            ["model.vision_tower.encoder.layer.0.mlp.fc1", "model.multi_modal_projector.linear_1"],
            ["model.language_model.layers.0.self_attn.q_proj"],
        ),
        (
            "qwen3-30b-a3b",
            ["model.layers.0.mlp.gate"],
            ["model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.self_attn.k_proj"],
        ),
        (
            "qwen3.5-27b",
            ["model.language_model.layers.0.linear_attn.in_proj_qkv"],
            ["model.language_model.layers.0.linear_attn.out_proj"],
        ),
    ],
)
def test_towers_heads_and_routers_stay_in_16_bits(model, kept, packed) -> None:
    assert [name for name in kept if not in_16_bits(model, name)] == []
    assert [name for name in packed if in_16_bits(model, name)] == []
    assert scheme_for(preset_model(model)).group_size == 128


def test_inputs_of_a_delta_net_are_not_among_the_packed_layers() -> None:
    roles = {tensor.role for tensor in packed_linears(preset_model("qwen3.5-27b"))}
    assert "delta.o" in roles
    assert not roles & {"delta.qkv", "delta.z"}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("llava-1.5-7b", "AWQ"),  # TurboMind has no encoder, the PyTorch engine reads AWQ
        ("internvl3-8b", "-hf"),  # Transformers has no class of it
        ("internvl3-8b-awq", "16-bit"),
    ],
)
def test_models_that_cannot_be_made_are_refused_with_another_way(model, said) -> None:
    with pytest.raises(UsageError) as caught:
        scheme_for(preset_model(model))
    assert said in caught.value.hint


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-20b"])
def test_models_whose_experts_get_other_names_are_refused(name) -> None:
    """llm-compressor writes gate_proj for each expert, which TurboMind's classes do not read."""
    model = replace(preset_model(name), quantization=None)
    with pytest.raises(UsageError) as caught:
        scheme_for(model)
    assert model.architecture in caught.value.message
    assert "gate_proj" in caught.value.message
    assert packed_model(model) is None


def test_what_is_made_of_float32_has_16_bits() -> None:
    half = preset_model("llama-3.1-8b")
    made = packed_model(replace(half, dtype="float32"))
    assert made is not None
    assert made.dtype == "bfloat16"
    assert made.weight_bytes == packed_model(half).weight_bytes
