"""What a checkpoint's config says of its quantisation, and which layers it exempts."""

from __future__ import annotations

import pytest

from tests.model.checkpoints import LLAMA, llama_tensors, make, read
from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.model.parameters import stored_bytes
from turbofit.model.quantization import exempts
from turbofit.model.source import resolve_model

INPUTS = "linear_attn.in_proj_qkv"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize(
    ("name", "exempted"),
    [
        ("linear_attn", True),
        ("model.language_model.layers.0.linear_attn", True),
        ("model.language_model.layers.3.linear_attn.in_proj_qkv", True),
        ("re:.*linear_attn.*", True),
        ("re:.*linear_attn.in_proj_[ab]$", False),
        ("model.language_model.layers.0.linear_attn.in_proj_a", False),
        ("model.visual", False),
        ("lm_head", False),
        ("re:(", False),
        ("", False),
    ],
)
def test_a_name_or_an_expression_exempts_a_layer(name: str, exempted: bool) -> None:
    packing = Quantization(method="fp8", bits=8, group_size=128, unconverted=("mtp", name))
    assert exempts(packing, INPUTS) is exempted


def test_awq_as_stored(tmp_path):
    config = LLAMA | {"quantization_config": AWQ | {"modules_to_not_convert": ["visual"]}}
    model = resolve_model(make(tmp_path / "a", config, llama_tensors(awq=True)))
    assert model.quantization == Quantization(
        method="awq", bits=4, group_size=128, unconverted=("visual",)
    )
    assert model.weight_bytes == stored_bytes(model.text, None, "float16", model.quantization)
    assert set(model.tensor_bytes) == {"F16", "I32"}
    assert sum(model.tensor_bytes.values()) == model.weight_bytes
    assert model.parameters == resolve_model(make(tmp_path / "b")).parameters


@pytest.mark.parametrize(
    "change",
    [
        {"version": "gemv"}, {"bits": 8}, {"group_size": 48}, {"quant_method": "bitsandbytes"},
        {"quant_method": "gptq", "desc_act": True}, {"quant_method": "gptq", "sym": False},
        {"quant_method": "fp8"}, {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "smooth_quant"}, {"quant_method": "compressed-tensors"},
        {"group_size": "128"}, {"quant_method": 4},
    ],
)  # fmt: skip
def test_quantisation_that_the_engine_refuses(change):
    with pytest.raises(UsageError):
        read(config=LLAMA | {"quantization_config": AWQ | change})


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
         ("gptq", 4, 128)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", 8, 128)),
        ({"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {
            "group_0": {"format": "pack-quantized",
                        "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}},
         ("compressed-tensors", 4, 32)),
    ],
)  # fmt: skip
def test_quantisation_that_the_engine_takes(quantization, expected):
    found = read(config=LLAMA | {"quantization_config": quantization}).quantization
    assert (found.method, found.bits, found.group_size) == expected


def test_a_format_that_only_the_whole_config_names():
    """TurboMind reads config_groups.group_0.format: KeyError 'format' at its start."""
    weights = {"num_bits": 4, "type": "int", "group_size": 128}
    quantization = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": weights}},
    }  # fmt: skip
    with pytest.raises(UsageError, match="config_groups without a format") as told:
        read(config=LLAMA | {"quantization_config": quantization})
    assert '"format": "pack-quantized"' in told.value.hint
