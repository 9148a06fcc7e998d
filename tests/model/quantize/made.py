"""A model of two layers in 16 bits, and the same in compressed-tensors of 4 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.support.tiny_checkpoints import LLAMA, llama_tensors, make

GROUP = 128


def config_of(group: int = GROUP, **more: Any) -> dict[str, Any]:
    """A config as llm-compressor 0.14 writes it."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    first = {"format": "pack-quantized", "targets": ["Linear"]}
    packing = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**first, "weights": {**weights, "group_size": group}}},
    }
    packing["config_groups"] |= more
    return {**LLAMA, "torch_dtype": "bfloat16", "quantization_config": packing}


def make_plain(folder: Path) -> Path:
    """The 16-bit checkpoint, with random weights and a tokenizer's file."""
    import torch
    from safetensors.torch import save_file

    make(folder, {**LLAMA, "torch_dtype": "bfloat16"}, tensors={})
    torch.manual_seed(0)
    shapes = {name: shape for name, (_, shape) in llama_tensors().items()}
    weights = {name: torch.randn(shape).mul(0.05).bfloat16() for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def packed_tensors(plain: Path) -> dict[str, Any]:
    """The checkpoint's tensors, the decoder's linear layers rounded to 4 bits and packed."""
    from safetensors.torch import load_file

    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        module = name.removesuffix(".weight")
        tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"] = pack(weight)
    return tensors


def pack(weight: Any) -> tuple[Any, Any]:
    """Round to the nearest of 16 values in groups of 128; eight in an int32, the first lowest."""
    import torch

    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(2) / 7).bfloat16()
    whole = (groups / scale.float()[:, :, None]).round().clamp(-8, 7).reshape(weight.shape)
    digits = (whole.to(torch.int64) + 8).reshape(weight.shape[0], -1, 8)
    words = sum(digits[:, :, i] << (4 * i) for i in range(8))
    return words.where(words < 2**31, words - 2**32).to(torch.int32), scale


def write_packed(plain: Path, out: Path, tensors: Any = None, config: Any = None) -> Path:
    """A checkpoint of 4 bits beside its source, with the source's small files."""
    from safetensors.torch import save_file

    shutil.copytree(plain, out, ignore=shutil.ignore_patterns("*.safetensors"))
    (out / "config.json").write_text(json.dumps(config or config_of()))
    weights = packed_tensors(plain) if tensors is None else tensors
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def fill_randomly(path: Path) -> None:
    """Give a file's tensors, which are holes, random values; norms are ones."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        ones = "norm" in name and name.endswith("weight")
        tensors[name] = torch.ones_like(tensor) if ones else torch.randn(tensor.shape).mul(0.05)
        tensors[name] = tensors[name].to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
