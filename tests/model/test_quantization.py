"""What a checkpoint's config says of its quantisation."""

from __future__ import annotations

import pytest

from tests.support.tiny_checkpoints import LLAMA, llama_tensors, make, read
from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.core.units import GIB
from turbofit.model.parameters import stored_bytes
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


#: Bytes in GiB of files, of presets with their draft of 16 bits, but for g_idx (GPTQ's of
#: many experts, 0.18); of language models alone.
#: Source: the safetensors headers as docs of github.com/sinkarusa/jevemu list them.
FILES = {
    "qwen3.5-27b-gptq-int4": 28.16,
    "qwen3.6-35b-a3b-awq": 23.70,
    "qwen3.6-35b-a3b-gptq-int4": 22.73,
    "qwen3.5-35b-a3b-awq": 23.71,
    "qwen3.8-27b": 51.75,
}
LANGUAGE_MODELS = {"qwen3.6-27b-awq": 18.70, "qwen3.6-35b-a3b-awq": 21.30}


@pytest.mark.parametrize(("preset", "gib"), (FILES | LANGUAGE_MODELS).items())
def test_a_preset_is_as_large_as_its_files(preset: str, gib: float) -> None:
    model = preset_model(preset)
    text, moe = model.text, model.text.moe
    if preset in LANGUAGE_MODELS:
        size = stored_bytes(text, None, model.dtype, model.quantization)
        assert size / GIB == pytest.approx(gib, abs=0.05)
        return
    hidden, inner = text.hidden, text.heads * text.head_dim
    keys = 2 * text.kv_heads * text.head_dim
    draft = hidden * (3 * inner + keys) + 2 * hidden * hidden
    if moe:
        draft += 3 * hidden * (moe.experts * moe.intermediate + moe.shared_intermediate)
    else:
        draft += 3 * hidden * text.intermediate
    assert (model.weight_bytes + 2 * draft) / GIB == pytest.approx(gib, abs=0.18)


def test_a_zero_point_of_each_group_is_stored_where_it_is_asymmetric() -> None:
    """The files of Qwen3.8-27B-AWQ-INT4 have 21.018 GB, its draft's 0.85 GB among them."""
    assert preset_model("qwen3.8-27b-int4-g32").weight_bytes == pytest.approx(20.168e9, rel=1e-4)
    for symmetric in (True, False):
        stored = packed("group", 32, symmetric=symmetric)
        model = read(config=LLAMA | {"quantization_config": stored})
        assert model.quantization.asymmetric is not symmetric


def test_gptq_says_in_dynamic_what_it_leaves() -> None:
    plain = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    rules = {"lm_head": {}, "-:.*attn.*": {}, "-:.*visual.*": {}}
    config = LLAMA | {"quantization_config": plain | {"dynamic": rules}}
    assert read(config=config).quantization.unconverted == ("re:.*attn.*", "re:.*visual.*")
    rules = {"+:.*down.*": {"bits": 8}}
    with pytest.raises(UsageError, match="several ways of packing"):
        read(config=LLAMA | {"quantization_config": plain | {"dynamic": rules}})


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


def packed(strategy=None, group_size=None, stored="pack-quantized", **weights):
    """The quantization_config of compressed-tensors."""
    found = {"num_bits": 4, "type": "int", "strategy": strategy, "group_size": group_size}
    group = {"format": stored, "targets": ["Linear"], "weights": found | weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "smooth_quant", "quant_dtype": "int8"},
         "0.18's PyTorch engine runs smooth_quant .W8A8., and turbofit has no account of it"),
        ({"quant_method": "fp8", "activation_scheme": "static"},
         "PyTorch engine runs fp8 with one static scale a tensor, and turbofit has no account"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "it has no blocks"),
        ({"quant_method": "fp8", "weight_block_size": None}, "it has no blocks"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "it has blocks of 64 x 64"),
        (packed("channel", -1), "4 bits and one scale a channel"),
        (packed("channel", None), "4 bits and one scale a channel"),
        (packed(None, -1), "4 bits and one scale a channel"),
        (packed(None, None), "4 bits and one scale a tensor"),
        (packed("tensor", None, num_bits=8), "8 bits and one scale a tensor"),
        (packed("group", 64), "compressed-tensors with 4 bits in groups of 64"),
        (packed("group", 128, num_bits=8), "compressed-tensors with 8 bits in groups of 128"),
        (packed("channel", None, "int-quantized", num_bits=8), "as 'int-quantized'"),
        (packed("channel", None, "float-quantized", type="float"), "as 'float-quantized'"),
        (packed("tensor_group", 16, "nvfp4-pack-quantized", type="float"), "nvfp4-pack-quantized"),
        (packed("group", 32, "mxfp4-pack-quantized", type="float"), "mxfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {}},
         "without weights in config_groups.group_0"),
        ({"quant_method": "compressed-tensors", "config_groups": {
            "group_0": packed("group", 128)["config_groups"]["group_0"],
            "group_1": packed("channel", -1)["config_groups"]["group_0"]}}, "2 groups of layers"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "gptq with 4 bits and one scale a"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "gptq with 8 bits in groups of"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "run GPTQ with desc_act"),
        ({"quant_method": "gptq", "bits": 4, "sym": False}, "run GPTQ without sym"),
        (AWQ | {"version": "gemv"}, "an AWQ version other than gemm, here 'gemv'"),
        (AWQ | {"group_size": -1}, "awq with 4 bits and one scale a channel"),
        ({"load_in_8bit": True}, "whose quantization_config has no quant_method"),
        *(({"quant_method": name}, f"does not run the quantisation '{name}'") for name in (
            "bitsandbytes", "quanto", "hqq", "aqlm", "eetq", "fbgemm_fp8", "modelopt", "torchao",
            "auto-round", "gguf", "awq_marlin")),
    ],
)  # fmt: skip
def test_what_no_engine_runs_or_has_no_account_is_refused_by_its_name(quantization, said):
    """None of these files is damaged."""
    with pytest.raises(UsageError, match=said) as told:
        read(config=LLAMA | {"quantization_config": quantization})
    assert "check the checkpoint's files" not in told.value.hint


@pytest.mark.parametrize(
    ("quantization", "said", "hint"),
    [
        (AWQ | {"version": None}, "instead of 'gemm'", '"version": "gemm"'),
        (AWQ | {"version": "GEMM"}, "instead of 'gemm'", '"version": "gemm"'),
        # TurboMind reads config_groups.group_0.format: KeyError 'format' at its start.
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
          "config_groups": {"group_0": {
              "weights": {"num_bits": 4, "type": "int", "group_size": 128}}}},
         "config_groups.group_0 has no format", '"format": "pack-quantized"'),
        # Files that contradict themselves.
        *((packed(*one), "group_size", "check the checkpoint's files") for one in (
            ("channel", 128), ("group", None), ("group", -1), ("group", 0), ("tensor", 32),
            ("group", {"a": 1}), ("group", True))),
    ],
)  # fmt: skip
def test_the_hint_names_the_key_that_mends_a_config_or_its_damage(quantization, said, hint):
    with pytest.raises(UsageError, match=said) as told:
        read(config=LLAMA | {"quantization_config": quantization})
    assert hint in told.value.hint
