"""Language models that published checkpoints store in a way of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.header_only import write_header, write_model
from turbofit.rehearse.checkpoint.tensors import tensors
from turbofit.rehearse.checkpoint.twin import twin_of


@pytest.mark.parametrize(
    ("preset", "dense"), [("gpt-oss-20b", 0), ("gpt-oss-20b-bf16", 0), ("glm-4.5", 1)]
)
def test_a_checkpoint_of_three_layers_is_read_whole(
    tmp_path: Path, preset: str, dense: int
) -> None:
    """As it is published: sinks, biases and packed experts; corrections and a layer that drafts."""
    model = preset_model(preset)
    assert model.text.moe is not None
    text = replace(model.text, layers=3, moe=replace(model.text.moe, layers=3 - dense))
    twin = twin_of(replace(model, text=text))
    folder = write_model(twin, tmp_path / "m")
    if dense:
        draft = [("model.layers.3.eh_proj.weight", "BF16", (5120, 2 * 5120))]
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        for part in folder.glob("model*.safetensors"):
            part.unlink()
        write_header(folder / "model.safetensors", [*tensors(twin), *draft])
    read = resolve_model(str(folder))
    assert read.text == text
    assert read.quantization == model.quantization
    assert not read.warnings
    stored = sum(read.tensor_bytes.values())
    assert stored == read.weight_bytes
    # At 16 bits but for the corrections' 32.
    corrections = 2 * 160 * 2 if dense else 0
    if model.quantization is None:
        assert stored == 2 * read.parameters + corrections


def test_glm_without_a_layer_of_experts_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["Glm4MoeForCausalLM"], "first_k_dense_replace": 46}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="leaves no layer with experts"):
        resolve_model(str(tmp_path))
