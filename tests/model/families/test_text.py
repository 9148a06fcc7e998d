"""Language models that published checkpoints store in a way of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.tiny_checkpoints import read
from turbofit.core.errors import UsageError
from turbofit.core.struct import to_builtins
from turbofit.model.config import Section
from turbofit.model.families.engines import engine_problem
from turbofit.model.families.text import read_text
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.header_only import write_header
from turbofit.rehearse.checkpoint.twin import tensors, twin_of, write_model


@pytest.mark.parametrize(
    ("preset", "layers", "dense", "draft"),
    [
        ("gpt-oss-20b", 3, 0, None), ("gpt-oss-20b-bf16", 3, 0, None),
        ("glm-4.5", 3, 1, ("model.layers.3.eh_proj.weight", "BF16", (5120, 2 * 5120))),
        ("deepseek-v2-lite", 3, 1, ("model.layers.3.eh_proj.weight", "BF16", (8, 8))),
        ("qwen3-next-80b-a3b", 4, 0, ("mtp.fc.weight", "BF16", (2048, 4096))),
    ],
)  # fmt: skip
def test_a_checkpoint_of_few_layers_is_read_whole(
    tmp_path: Path, preset: str, layers: int, dense: int, draft: Any
) -> None:
    """As it is published: sinks, biases and packed experts; corrections and what drafts."""
    model = preset_model(preset)
    moe, delta = model.text.moe, model.text.delta
    assert moe is not None
    text = replace(
        model.text, layers=layers, moe=replace(moe, layers=layers - dense),
        delta=delta and replace(delta, layers=3),
    )  # fmt: skip
    twin = twin_of(replace(model, text=text))
    folder = write_model(twin, tmp_path / "m")
    if draft:
        for part in folder.glob("model*"):
            part.unlink()
        write_header(folder / "model.safetensors", [*tensors(twin), draft])
    read = resolve_model(str(folder))
    assert read.text == text
    assert read.quantization == model.quantization
    assert not read.warnings
    stored = sum(read.tensor_bytes.values())
    # At 16 bits but for the corrections' 32; what drafts is not counted.
    corrections = (layers - dense) * moe.experts * 2 if moe.correction else 0
    if model.quantization is None:
        assert read.weight_bytes == stored == 2 * read.parameters + corrections


MODEL_TYPES = {
    "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
WINDOWS: list[tuple[str, dict[str, object], int]] = [
    ("mistral", {}, 4096),
    ("mistral", {"sliding_window": None}, 0),
    ("mistral", {"sliding_window": 1024}, 1024),
    ("mixtral", {}, 0),
    ("mixtral", {"sliding_window": 4096}, 4096),
    ("qwen2", {"sliding_window": 4096}, 0),
    ("qwen2", {"use_sliding_window": True}, 4096),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 32}, 0),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 4096),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 31}, 512),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1}, 4096),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 0}, 0),
    ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 99}, 4096),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "keys", "window"), WINDOWS)
def test_a_sliding_window_is_read_as_transformers_has_it(
    kind: str, keys: dict[str, object], window: int
) -> None:
    config = Section({"num_hidden_layers": 32, **keys}, "config.json")
    text = read_text(config, MODEL_TYPES[kind])
    assert text.window == window
    # No document of a model without a window has the field.
    assert ("sliding_window" in to_builtins(text)) == bool(window)


@pytest.mark.lmdeploy
@pytest.mark.parametrize(("kind", "keys", "window"), WINDOWS)
def test_transformers_own_config_has_that_window(
    kind: str, keys: dict[str, object], window: int
) -> None:
    from transformers import AutoConfig

    made = AutoConfig.for_model(kind, num_hidden_layers=32, **keys)
    kinds = getattr(made, "layer_types", None) or ["sliding_attention"]
    assert (made.sliding_window or 0 if "sliding_attention" in kinds else 0) == window


def test_dense_layers_among_experts():
    moe = {
        "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 4, "mlp_only_layers": [0, 9]
    }  # fmt: skip
    model = read(config=moe)
    assert model.text.moe.layers == 3
    assert engine_problem(model, "turbomind") is None
    for change in (
        {"decoder_sparse_step": 2, "mlp_only_layers": []},
        {"architectures": ["Qwen2MoeForCausalLM"]},
    ):
        model = read(config=moe | change)
        assert "sparse" in engine_problem(model, "turbomind")
        assert engine_problem(model, "pytorch") is None
    assert read(config=moe | {"decoder_sparse_step": 3, "mlp_only_layers": []}).text.moe.layers == 1
    with pytest.raises(UsageError):
        read(config=moe | {"mlp_only_layers": [0, 1, 2, 3]})
