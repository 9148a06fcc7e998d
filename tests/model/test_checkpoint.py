"""A checkpoint read whole: files, bytes, type; hostile files are refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.hostile import hostile
from tests.support.checkpoints import make_text
from tests.support.safetensors_file import write_safetensors
from tests.support.tiny_checkpoints import LLAMA, QWEN, llama_tensors, make, read
from turbofit.core.errors import UsageError
from turbofit.core.model import Model, ModelSource
from turbofit.core.struct import decode, to_json
from turbofit.model.checkpoint import read_checkpoint
from turbofit.model.folder import FolderFiles, is_complete
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import config_of, twin_of


def test_exact_bytes_and_type_from_headers(tmp_path):
    model = resolve_model(make(tmp_path / "tiny"))
    assert (model.name, model.source.kind, model.source.sizes) == ("tiny", "folder", "file")
    assert model.weight_bytes == sum(2 * math.prod(shape) for _, shape in llama_tensors().values())
    assert model.tensor_bytes == {"F16": model.weight_bytes}
    assert model.weight_bytes == 2 * model.parameters
    assert (model.dtype, model.warnings) == ("float16", ())
    assert model.source.checkpoint == str(tmp_path / "tiny")
    stored = resolve_model(make(tmp_path / "tiny", tensors=llama_tensors(dtype="BF16")))
    assert stored.dtype == "bfloat16"  # whatever the config says
    # A checkpoint of torch's files alone gets sizes by formula.
    folder = make(tmp_path / "x", tensors={})
    (tmp_path / "x" / "pytorch_model.bin").write_bytes(b"\x80")
    model = resolve_model(folder)
    assert (model.source.sizes, model.tensor_bytes) == ("formula", {})
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


@pytest.mark.parametrize(
    ("preset", "needs"),
    [("llama-3.1-8b", False), ("internvl2-8b", True), ("deepseek-moe-16b", True),
     ("intern-s1-pro", True), ("kimi-k2.5", True), ("qwen3.5-35b-a3b", False)],
)  # fmt: skip
def test_remote_code_of_the_config_matters_to_few(preset, needs):
    config = config_of(twin_of(preset_model(preset)))
    config.pop("auto_map", None)
    assert not read(config=config).needs_remote_code
    mapped = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
    assert read(config=config | {"auto_map": mapped}).needs_remote_code is needs
    assert preset_model(preset).needs_remote_code is needs
    if preset == "qwen3.5-35b-a3b":
        config |= {"auto_map": mapped, "architectures": ["InternS2PreviewForConditionalGeneration"]}
        assert read(config=config).needs_remote_code


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": {"num_heads": 3, "embed_dim": 64, "hidden_size": 64}},
        {"vision_config": {"hidden_size": 65}}, {"vision_config": []}, {"num_key_value_heads": 3},
        {"num_attention_heads": 0}, {"hidden_size": 10**30}, {"hidden_size": 64.0},
        {"vocab_size": True}, {"architectures": "Qwen2VLForConditionalGeneration"},
        {"architectures": [{}]}, {"architectures": []}, {"architectures": None},
        {"architectures": ["DeepseekV4ForCausalLM"]}, {"architectures": ["LlavaLlamaForCausalLM"]},
        {"architectures": ["Nonsense" * 99]},
    ],
)  # fmt: skip
def test_configs_that_are_refused(change):
    with pytest.raises(UsageError) as error:
        read(config=QWEN | change)
    assert len(error.value.message) < 300


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"num_hidden_layers": 3}, ("3 layers", "has 2")),
        ({"num_hidden_layers": 1}, ("1 layers", "has 2")),
        ({"intermediate_size": 700}, ("1,520,896 parameters", "1,232,128")),
        ({"intermediate_size": 16}, ("470,272 parameters", "1,232,128")),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, both):
    with pytest.raises(UsageError) as error:
        resolve_model(make(tmp_path / "x", LLAMA | change, llama_tensors()))
    assert all(part in error.value.message for part in both)


def test_a_checkpoint_with_a_tensor_less_or_more(tmp_path):
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(UsageError, match="parameters, but the weights hold"):
        resolve_model(make(tmp_path / "x", tensors=tensors))
    tied = resolve_model(make(tmp_path / "y", LLAMA | {"tie_word_embeddings": True}, tensors))
    assert tied.weight_bytes == 2 * tied.parameters
    # Elements that no dim explains are said.
    more = llama_tensors() | {"value_head.weight": ("F16", (256,))}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (64,))
    (warning,) = resolve_model(make(tmp_path / "z", tensors=more)).warnings
    assert "256 elements more" in warning


def test_sharded(tmp_path):
    folder = tmp_path / "tiny"
    make(folder, tensors={})
    names = list(llama_tensors())
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        write_safetensors(folder / file, {name: llama_tensors()[name] for name in part})
    index = {name: file for file, part in shards.items() for name in part}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    assert resolve_model(str(folder)).weight_bytes == 2 * resolve_model(str(folder)).parameters
    path.write_text(json.dumps({"weight_map": index | {"ghost": "model-1.safetensors"}}))
    with pytest.raises(UsageError, match="ghost"):
        resolve_model(str(folder))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UsageError, match="model-2"):
        resolve_model(str(folder))


def test_odd_files_that_are_read_or_passed_by(tmp_path):
    """A named pipe would block for ever; not a number is JSON too."""
    folder = make_text(tmp_path / "x")
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "tokenizer_config.json")
    os.mkfifo(folder / "preprocessor_config.json")
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "limit": [0.0, Infinity, NaN]}')
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


#: By the first byte of a piece.
NAMES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "video_preprocessor_config.json", "model.safetensors.index.json", "model.safetensors",
    "model-1.safetensors",
)  # fmt: skip


@hostile("checkpoints")
def test_a_checkpoint_is_refused_or_is_a_model(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        for piece in data.split(b"|~|"):
            if piece:
                (Path(folder) / NAMES[piece[0] % len(NAMES)]).write_bytes(piece[1:])
        is_complete(folder)
        try:
            source = ModelSource(kind="folder", where=folder, sizes="file")
            model = read_checkpoint(FolderFiles(folder), source)
        except UsageError:
            return
    assert decode(to_json(model), Model, what="the model") == model
    assert model.parameters > 0
