"""LLaVA-1.5 at real shapes in the Transformers format: no twin of its CLIP tower is made elsewhere.

Sizes are the preset's, names of tensors those of llava-hf/llava-1.5-7b-hf.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbofit.core.model import Model, TextDims, VisionDims
from turbofit.rehearse.checkpoint.header_only import write_header
from turbofit.rehearse.checkpoint.kinds import Entry, kinds
from turbofit.rehearse.checkpoint.tokenizer import special_tokens, write_tokenizer

__all__ = ["tensors", "write_llava"]

_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
    "do_convert_rgb": True, "do_resize": True, "do_center_crop": True,
    "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def tensors(text: TextDims, vision: VisionDims) -> Iterator[Entry]:
    """Name, dtype and shape of each."""
    width, inner = vision.hidden, vision.intermediate
    patches = (vision.image_size or 336) // vision.patch_size
    tower = "vision_tower.vision_model."
    shapes: dict[str, list[int]] = {
        f"{tower}embeddings.class_embedding": [width],
        f"{tower}embeddings.patch_embedding.weight": [
            width, 3, vision.patch_size, vision.patch_size
        ],
        f"{tower}embeddings.position_embedding.weight": [patches**2 + 1, width],
    }  # fmt: skip
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{tower}{norm}.{kind}": [width] for kind in ("weight", "bias")}
    for i in range(vision.layers):
        layer = f"{tower}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}mlp.fc1", inner, width)
        shapes |= _linear(f"{layer}mlp.fc2", width, inner)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{norm}.{kind}": [width] for kind in ("weight", "bias")}
    shapes |= _linear("multi_modal_projector.linear_1", text.hidden, width)
    shapes |= _linear("multi_modal_projector.linear_2", text.hidden, text.hidden)
    shapes |= _decoder(text)
    for name, shape in shapes.items():
        yield name, "F16", tuple(shape)


def _linear(name: str, rows: int, columns: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def _decoder(text: TextDims) -> dict[str, list[int]]:
    base, hidden, heads = "language_model.model.", text.hidden, text.heads * text.head_dim
    shapes = {
        f"{base}embed_tokens.weight": [text.vocab, hidden],
        f"{base}norm.weight": [hidden],
        "language_model.lm_head.weight": [text.vocab, hidden],
    }
    keys = text.kv_heads * text.head_dim
    for i in range(text.layers):
        layer = f"{base}layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": [heads, hidden],
            f"{layer}self_attn.k_proj.weight": [keys, hidden],
            f"{layer}self_attn.v_proj.weight": [keys, hidden],
            f"{layer}self_attn.o_proj.weight": [hidden, heads],
            f"{layer}mlp.gate_proj.weight": [text.intermediate, hidden],
            f"{layer}mlp.up_proj.weight": [text.intermediate, hidden],
            f"{layer}mlp.down_proj.weight": [hidden, text.intermediate],
            f"{layer}input_layernorm.weight": [hidden],
            f"{layer}post_attention_layernorm.weight": [hidden],
        }
    return shapes


def write_llava(model: Model, folder: Path) -> Path:
    """A checkpoint whose weights are a hole; returns the folder."""
    text, vision = model.text, model.vision
    assert vision is not None
    folder.mkdir(parents=True, exist_ok=True)
    write_header(folder / "model.safetensors", list(tensors(text, vision)))
    kind = kinds()["Qwen2VLForConditionalGeneration"].tokenizer
    ids = special_tokens(text.vocab, kind)
    write_tokenizer(folder, ids, text.max_position_embeddings, kind)
    image = ids["<|image_pad|>"]
    (folder / "config.json").write_text(json.dumps(_config(model, text, vision, image), indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))
    processor = {
        "processor_class": "LlavaProcessor", "image_token": "<|image_pad|>",
        "patch_size": vision.patch_size, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _config(model: Model, text: TextDims, vision: VisionDims, image: int) -> dict[str, Any]:
    return {
        "architectures": [model.architecture],
        "model_type": "llava",
        "image_token_index": image,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": text.hidden, "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads, "num_key_value_heads": text.kv_heads,
            "intermediate_size": text.intermediate, "vocab_size": text.vocab,
            "max_position_embeddings": text.max_position_embeddings, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "torch_dtype": "float16",
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": vision.hidden,
            "image_size": vision.image_size, "intermediate_size": vision.intermediate,
            "num_attention_heads": vision.heads, "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_size, "projection_dim": 768, "vocab_size": 32000,
        },
    }  # fmt: skip
