"""Writes LoRA adapters in peft's format whose matrices are zeros, as sparse files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tests.support.safetensors_file import write_safetensors
from turbofit.core.model import Model
from turbofit.model.adapters import PARENTS, layers_with, sizes_of

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
#: The modules that LLaVA and InternVL in Transformers' format can have.
BESIDE_TOWER: Final = ("o_proj", "gate_proj", "up_proj", "down_proj")
#: The modules of Qwen3.5's delta nets.
DELTA: Final = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
#: The modules as InternLM2's files call them.
INTERNLM2: Final = ("wqkv", "wo", "w1", "w3", "w2")


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
        outputs, inputs = sizes_of(model, module)
        place = f"{PARENTS[module]}.{module}"
        for layer in layers_with(model, module):
            for letter, shape in (("A", [rank, inputs]), ("B", [outputs, rank])):
                key = f"base_model.model.{layers}.{layer}.{place}.lora_{letter}.weight"
                tensors[key] = dtype, shape
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": list(modules), **settings,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
