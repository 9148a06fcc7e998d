"""A model read whole: its bytes, its type, and what its config must say."""

from __future__ import annotations

import json
import math

import pytest

from tests.support.checkpoints import make_internvl2
from tests.support.tiny_checkpoints import LLAMA, QWEN, llama_tensors, make, read
from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


def test_exact_bytes_from_headers(tmp_path):
    model = resolve_model(make(tmp_path / "tiny"))
    assert (model.name, model.source.kind, model.source.sizes) == ("tiny", "folder", "file")
    assert model.weight_bytes == sum(2 * math.prod(shape) for _, shape in llama_tensors().values())
    assert model.tensor_bytes == {"F16": model.weight_bytes}
    assert model.weight_bytes == 2 * model.parameters
    assert (model.dtype, model.warnings, model.source.checkpoint) == (
        "float16", (), str(tmp_path / "tiny"),
    )  # fmt: skip


def test_torch_only_checkpoints_get_formula_sizes(tmp_path):
    folder = make(tmp_path / "x", tensors={})
    (tmp_path / "x" / "pytorch_model.bin").write_bytes(b"\x80")
    model = resolve_model(folder)
    assert model.source.sizes == "formula"
    assert model.tensor_bytes == {}
    assert ".bin" in model.warnings[0]
    assert model.weight_bytes == 2 * model.parameters


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["t.T", None]}}}, True),
        ({"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}, False),
        ({"preprocessor_config": {"auto_map": {"AutoImageProcessor": "p.P"}}}, False),
    ],
)
def test_remote_code_of_a_tokenizer(files, expected):
    assert read(config=LLAMA, **files).needs_remote_code is expected


def test_remote_code_of_the_config_matters_only_to_internvl_chat(tmp_path):
    mapped = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
    assert not read(config=LLAMA | {"auto_map": mapped}).needs_remote_code
    folder = make_internvl2(tmp_path / "InternVL2-1B")
    config = json.loads((folder / "config.json").read_text())
    assert not resolve_model(str(folder)).needs_remote_code
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": mapped}))
    assert resolve_model(str(folder)).needs_remote_code


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": {"num_heads": 3, "embed_dim": 64, "hidden_size": 64}},
        {"vision_config": {"hidden_size": 65}},
        {"vision_config": []},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 0},
        {"hidden_size": 10**30},
        {"hidden_size": 64.0},
        {"vocab_size": True},
        {"architectures": "Qwen2VLForConditionalGeneration"},
        {"architectures": [{}]},
        {"architectures": []},
        {"architectures": None},
        {"architectures": ["DeepseekV4ForCausalLM"]},
        {"architectures": ["LlavaLlamaForCausalLM"]},
        {"architectures": ["Nonsense" * 99]},
    ],
)
def test_configs_that_are_refused(change):
    with pytest.raises(UsageError) as error:
        read(config=QWEN | change)
    assert len(error.value.message) < 300
