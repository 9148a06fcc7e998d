"""Tiny LLaVA checkpoints in the Transformers format: 1.5, NeXT and OneVision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.checkpoints import _TEXT, _qwen2, _write

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
    """LLaVA in the Transformers format: ``llava`` (1.5), ``llava_next`` or ``llava_onevision``."""
    names = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
    name = names[kind]
    config: dict[str, Any] = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_index": 262,
        "projector_hidden_act": "gelu",
        "text_config": _TEXT,
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
    if kind == "llava_next":
        grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        config["image_grid_pinpoints"] = processor["image_grid_pinpoints"] = grids
    if kind == "llava_onevision":
        grids = [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)]
        config |= {
            "image_grid_pinpoints": grids,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_config": {
                **_CLIP, "model_type": "siglip_vision_model", "image_size": 384,
                "vision_use_head": False,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }  # fmt: skip
        processor |= {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": grids}
        outer = {
            "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 729,
            "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
            "image_token": "<|image_pad|>",
        }  # fmt: skip
    shapes = {
        **_clip(siglip=kind == "llava_onevision"),
        **_qwen2("language_model.model.", "language_model.lm_head.weight"),
    }
    if kind != "llava":
        shapes["image_newline"] = [128]
    _write(folder, config, shapes)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "processor_config.json").write_text(json.dumps(outer))
    return folder


def _clip(*, siglip: bool) -> dict[str, list[int]]:
    """CLIP's tower of 336 pixels, or SigLIP's of 384, and LLaVA's projector."""
    hidden, inner, text = 64, 128, 128
    tower = "vision_tower.vision_model."
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": [hidden, 3, 14, 14],
        f"{tower}embeddings.position_embedding.weight": [729 if siglip else 577, hidden],
        f"{tower}post_layernorm.weight": [hidden],
        f"{tower}post_layernorm.bias": [hidden],
        "multi_modal_projector.linear_1.weight": [text, hidden],
        "multi_modal_projector.linear_1.bias": [text],
        "multi_modal_projector.linear_2.weight": [text, text],
        "multi_modal_projector.linear_2.bias": [text],
    }
    if siglip:
        shapes[f"{tower}embeddings.patch_embedding.bias"] = [hidden]
    else:
        shapes |= {
            f"{tower}embeddings.class_embedding": [hidden],
            f"{tower}pre_layrnorm.weight": [hidden],
            f"{tower}pre_layrnorm.bias": [hidden],
        }
    for i in range(2):
        layer = f"{tower}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {
                f"{layer}self_attn.{name}.weight": [hidden, hidden],
                f"{layer}self_attn.{name}.bias": [hidden],
            }
        shapes |= {
            f"{layer}mlp.fc1.weight": [inner, hidden],
            f"{layer}mlp.fc1.bias": [inner],
            f"{layer}mlp.fc2.weight": [hidden, inner],
            f"{layer}mlp.fc2.bias": [hidden],
        }
        for number in (1, 2):
            shapes |= {
                f"{layer}layer_norm{number}.weight": [hidden],
                f"{layer}layer_norm{number}.bias": [hidden],
            }
    return shapes
