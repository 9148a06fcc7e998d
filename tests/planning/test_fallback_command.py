"""Maps on a command line, and maps in Transformers' own hands."""

from __future__ import annotations

import json

import pytest

from tests.launch.fallback.support import tiny_map, tiny_qwen2_vl
from turbofit.core.errors import UsageError
from turbofit.planning.commands import folded, read_map


def test_runs_of_layers_are_folded():
    placed = tiny_map([0, 0, "cpu", 1])
    text = folded(placed)
    assert '"model.language_model.layers.0-1":0' in text
    assert '"model.language_model.layers.2":"cpu"' in text
    assert read_map(text) == placed


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "nowhere.json",
        '{"model": "gpu"}',
        '{"model": 1.5}',
        '{"a": ' + "[" * 9999,
        '{"\\ud800": 0}',
    ],
)
def test_what_is_no_map_is_refused(text):
    with pytest.raises(UsageError, match="device map"):
        read_map(text)


@pytest.mark.lmdeploy
def test_layers_off_the_device_give_the_same_tokens(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    folder = tiny_qwen2_vl(tmp_path / "Qwen2-VL")
    from transformers import Qwen2VLForConditionalGeneration as Model

    ids = torch.arange(5, 45).reshape(1, -1)

    def tokens(placed):
        scratch = tmp_path / "scratch"
        model = Model.from_pretrained(
            str(folder), device_map=placed, dtype=torch.float32, attn_implementation="sdpa",
            offload_folder=str(scratch),
        ).eval()  # fmt: skip
        assert not list(scratch.glob("*.dat"))  # safetensors are read where they lie
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                             min_new_tokens=12, do_sample=False)  # fmt: skip
        return out[0, 40:].tolist(), model

    whole, _ = tokens({"": "cpu"})
    split, model = tokens(read_map(folded(tiny_map(["cpu", "disk", "disk", "cpu"]))))
    assert split == whole
    assert len(set(whole)) > 1
    assert model.model.language_model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert model.device.type == "cpu"
    assert json.loads(folded(tiny_map(["cpu"] * 4)))["model.language_model.layers.0-3"] == "cpu"
