"""What a folder, a hub id and a missing path are read as, and what is said where none can."""

from __future__ import annotations

import pytest

from tests.model.refused_name import refused
from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


@pytest.mark.parametrize("config", ["", '{"architectures": ["LlavaLlamaForCausalLM"]}'])
def test_an_adapter_is_not_a_model(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text("{}")
    if config:
        (tmp_path / "config.json").write_text(config)
    assert "turbofit merge BASE ADAPTER OUT" in refused(str(tmp_path)).hint


@pytest.mark.parametrize(
    ("path", "hub_id"),
    [
        ("/data/models/InternVL2_5-8B-MPO", "OpenGVLab/InternVL2_5-8B"),
        ("./Qwen2.5-VL-7B-Instruct-sft", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("/data/Qwen2.5-VL-7B-Instruct-lora-merged", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("/data/Qwen2.5-VL-7B-Instruct-merged", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_a_missing_folder_with_a_known_end_has_its_base_s_shapes(
    path, hub_id, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = resolve_model(path)
    assert model.weight_bytes == resolve_model(hub_id).weight_bytes
    assert model.hub_id == path  # the folder is where the command runs
    assert "its shapes are assumed to be those of the preset" in model.warnings[0]


@pytest.mark.parametrize("path", ["/data/Qwen2.5-VL-7B-Instruct-lora", "/data/Qwen2.5-VL-9B-sft"])
def test_a_missing_folder_of_another_kind_is_refused(path):
    assert refused(path)


def test_a_preset_stands_in_for_a_hub_that_is_out_of_reach(monkeypatch):
    model_id = "OpenGVLab/InternVL2-8B"
    assert "forbids the network" in resolve_model(model_id).warnings[0]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "yes")
    assert "forbids the network" in resolve_model(model_id).warnings[0]
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    model = resolve_model(model_id)
    assert model.source.kind == "preset"
    assert "127.0.0.1:9 cannot be reached" in model.warnings[0]
    assert "preset internvl2-8b" in model.warnings[0]
    with pytest.raises(UsageError, match="cannot be reached"):
        resolve_model("org/tiny")


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ([], "has no config.json", "Hugging Face's format"),
        (["README.md"], "has no config.json", "Hugging Face's format"),
        (["model-Q4_K_M.gguf"], "GGUF", "safetensors checkpoint that it was made of"),
        (["consolidated.00.pth", "params.json"], "original format of Llama", "safetensors"),
        (["pytorch_model.bin"], "has no config.json", "Hugging Face's format"),
    ],
)
@pytest.mark.parametrize("name", ["{path}", "org/name", "name"])
def test_a_folder(name, files, message, hint, tmp_path, monkeypatch):
    root = tmp_path / "org"
    folder = root / "name"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    monkeypatch.chdir(root if name == "name" else tmp_path)
    error = refused(name.format(path=folder))
    assert message in error.message
    assert str(folder) in error.message
    assert hint in error.hint
