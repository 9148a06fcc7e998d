"""Writes LoRA adapters in peft's format whose matrices are zeros, as sparse files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tests.support.safetensors_file import write_safetensors
from turbofit.core.model import Model
from turbofit.model.adapters import lora_modules

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(
    model: Model,
    folder: Path,
    rank: int,
    modules: tuple[str, ...] = ALL,
    *,
    dtype: str = "F32",
    layers: str = "model.layers",
    **settings: Any,
) -> Path:
    """Write an adapter of a model's decoder; ``settings`` replace values of its config."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    for module in modules:
        tensor = lora_modules(model.text)[module]
        part = "self_attn" if module in ATTENTION else "mlp"
        outputs, inputs = tensor.shape
        for layer in tensor.layers or ():
            for letter, shape in (("A", [rank, inputs]), ("B", [outputs, rank])):
                key = f"base_model.model.{layers}.{layer}.{part}.{module}.lora_{letter}.weight"
                tensors[key] = dtype, shape
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": list(modules), **settings,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
