"""Tiny LLaVA checkpoints in the Transformers format: 1.5 and NeXT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tests.support.checkpoints import TEXT, write, write_files
from tests.support.safetensors_file import write_safetensors
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import tensors, twin_of

_CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "image_size": 336,
    "intermediate_size": 128,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "projection_dim": 64,
    "vocab_size": 512,
}
_CLIP_PROCESSOR: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 336},
    "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def make_llava(folder: Path, kind: str = "llava") -> Path:
    """LLaVA in the Transformers format: ``llava`` (1.5) or ``llava_next``."""
    name = "Llava" if kind == "llava" else "LlavaNext"
    config: dict[str, Any] = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_index": 262,
        "projector_hidden_act": "gelu",
        "text_config": TEXT,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": _CLIP,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    processor = {
        **_CLIP_PROCESSOR,
        "image_processor_type": "CLIPImageProcessor"
        if kind == "llava"
        else f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
    }
    outer: dict[str, Any] = {
        "processor_class": f"{name}Processor",
        "image_token": "<|image_pad|>",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if kind != "llava":
        grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        config["image_grid_pinpoints"] = processor["image_grid_pinpoints"] = grids
    files = {"preprocessor_config": processor, "processor_config": outer}
    if kind == "llava":
        return write(folder, config, **files)
    write_files(folder, config=config, **files)
    # Rehearsals have none of it: LLaVA's with a row that ends a line of an image.
    model = replace(resolve_model(str(folder)), architecture="LlavaForConditionalGeneration")
    found = {name: (dtype, shape) for name, dtype, shape in tensors(twin_of(model))}
    write_safetensors(folder / "model.safetensors", {**found, "image_newline": ("BF16", (128,))})
    return folder
