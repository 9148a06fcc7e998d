"""A checkpoint read whole: files, bytes, type, and a config and tensors of one model."""

from __future__ import annotations

import json
import math
import os

import pytest

from tests.support.checkpoints import make_internvl2, make_text, write_safetensors
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


def test_stored_dtype_wins_over_the_config(tmp_path):
    model = resolve_model(make(tmp_path / "tiny", tensors=llama_tensors(dtype="BF16")))
    assert model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"vocab_size": 101}, ("101", "100x256")),
        ({"num_hidden_layers": 3}, ("3 layers", "has 2")),
        ({"num_hidden_layers": 1}, ("1 layers", "has 2")),
        ({"intermediate_size": 511}, ("511", "512x256")),
        ({"num_key_value_heads": 2}, ("256", "128x256")),
        ({"head_dim": 64}, ("128", "256x256")),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, both):
    with pytest.raises(UsageError) as error:
        resolve_model(make(tmp_path / "x", LLAMA | change, llama_tensors()))
    assert all(part in error.value.message for part in both)


def test_a_checkpoint_without_head_must_be_tied(tmp_path):
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(UsageError, match="lm_head"):
        resolve_model(make(tmp_path / "x", tensors=tensors))
    tied = resolve_model(make(tmp_path / "y", LLAMA | {"tie_word_embeddings": True}, tensors))
    assert tied.weight_bytes == 2 * tied.parameters


def test_elements_that_no_dim_explains_are_said(tmp_path):
    tensors = llama_tensors() | {"value_head.weight": ("F16", (256,))}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (64,))
    warnings = resolve_model(make(tmp_path / "x", tensors=tensors)).warnings
    assert len(warnings) == 1
    assert "256 elements more" in warnings[0]


def test_not_a_number_is_json_too(tmp_path):
    folder = make(tmp_path / "x")
    text = (tmp_path / "x" / "config.json").read_text()
    (tmp_path / "x" / "config.json").write_text(text[:-1] + ', "limit": [0.0, Infinity, NaN]}')
    assert resolve_model(folder).parameters


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a":}', "\udcff", "[" * 200_000])
def test_broken_json(tmp_path, text):
    folder = make_text(tmp_path / "x")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError):
        resolve_model(str(folder))


def test_sharded(tmp_path):
    folder = tmp_path / "tiny"
    make(folder, tensors={})
    names = list(llama_tensors())
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        write_safetensors(folder / file, {name: llama_tensors()[name] for name in part})
    index = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    assert resolve_model(str(folder)).weight_bytes == 2 * resolve_model(str(folder)).parameters
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UsageError, match="model-2"):
        resolve_model(str(folder))


def test_an_index_that_names_what_no_file_holds(tmp_path):
    folder = tmp_path / "tiny"
    make(folder)
    index = {"weight_map": dict.fromkeys([*llama_tensors(), "ghost"], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="ghost"):
        resolve_model(str(folder))


def test_a_pipe_is_not_a_config(tmp_path):
    """A named pipe would block for ever."""
    folder = make_text(tmp_path / "x")
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "tokenizer_config.json")
    os.mkfifo(folder / "preprocessor_config.json")
    assert resolve_model(str(folder)).parameters


@pytest.mark.parametrize(
    ("files", "bounds"),
    [
        ({"preprocessor_config": {"min_pixels": 3136, "max_pixels": 12845056}}, (3136, 12845056)),
        ({"preprocessor_config": {"size": {"shortest_edge": 9, "longest_edge": 784}}}, (9, 784)),
        ({"preprocessor_config": {"max_pixels": 9, "size": {"longest_edge": 7840}}}, (3136, 9)),
        ({"preprocessor_config": {"max_pixels": 9},
          "processor_config": {"image_processor": {"max_pixels": 11}}}, (3136, 11)),
        ({"preprocessor_config": {"max_pixels": 9}, "processor_config": {"a": 1}}, (3136, 9)),
        ({}, (3136, 1003520)),
    ],
)  # fmt: skip
def test_qwen_pixel_bounds(files, bounds):
    model = read(config=QWEN, **files)
    assert (model.image_rule.min_pixels, model.image_rule.max_pixels) == bounds
    assert bool(model.warnings) is (not files)
