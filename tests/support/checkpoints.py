"""Makes tiny checkpoints offline: real file formats, real tensor names, random nothing inside.

Dims are small, the image rules are the published ones. Needs no library: safetensors are written by
hand, and the tokenizer is the stand-in of rehearsals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbofit.rehearsal.checkpoint.tokenizer import byte_alphabet, byte_level

_BITS = {"BF16": 16, "F16": 16, "F32": 32, "I32": 32, "I64": 64, "F8_E4M3": 8, "U8": 8}
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 258,
}
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
)


def make_internvl2(folder: Path, *, max_dynamic_patch: int = 12) -> Path:
    """InternVL2 with a Qwen2 language model inside (as the 1B has); 256 tokens a tile."""
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 64,
        "image_size": 448,
        "patch_size": 14,
        "intermediate_size": 128,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "num_channels": 3,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "torch_dtype": "bfloat16",
    }
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": _TEXT,
        "max_dynamic_patch": max_dynamic_patch,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "Hermes-2",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }
    return _write(
        folder,
        config,
        {
            **_internvit(64, 128, 2, text_hidden=128),
            **_qwen2("language_model.model.", "language_model.lm_head.weight"),
        },
    )


def make_internvl_hf(folder: Path, *, max_patches: int = 12) -> Path:
    """InternVL3 in the Transformers format; its processor is what Transformers' own class reads."""
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 264,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": _TEXT,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "architectures": ["InternVLVisionModel"],
            "model_type": "internvl_vision",
            "attention_bias": True,
            "hidden_size": 64,
            "image_size": [448, 448],
            "intermediate_size": 128,
            "norm_type": "layer_norm",
            "num_attention_heads": 1,
            "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": [14, 14],
            "use_qk_norm": False,
        },
    }
    processor = {
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": max_patches,
        "size": {"height": 448, "width": 448},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
    }
    _write(folder, config, {**_internvl_hf(), **_qwen2("language_model.model.", "lm_head.weight")})
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "processor_config.json").write_text(
        json.dumps({"image_seq_length": 256, "processor_class": "InternVLProcessor"})
    )
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["extra_special_tokens"] = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<|video_pad|>",
    }
    path.write_text(json.dumps(tokenizer))
    return folder


def make_qwen2_vl(folder: Path, *, max_pixels: int = 12845056) -> Path:
    """Qwen2-VL; its processor is what Transformers' own class reads."""
    config = {
        **_TEXT,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": 262,
        "video_token_id": 263,
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": {
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "mlp_ratio": 4,
            "num_heads": 1,
            "in_chans": 3,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }
    processor = {
        "min_pixels": 3136,
        "max_pixels": max_pixels,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    _write(folder, config, {**_qwen2_vit(), **_qwen2("model.", "lm_head.weight")})
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_text(folder: Path) -> Path:
    """Qwen2 without images."""
    return _write(folder, _TEXT, _qwen2("model.", "lm_head.weight"))


def _qwen2(prefix: str, head: str) -> dict[str, list[int]]:
    hidden, inner, vocab = 128, 256, 512
    key_value = 2 * 64
    shapes = {
        f"{prefix}embed_tokens.weight": [vocab, hidden],
        f"{prefix}norm.weight": [hidden],
        head: [vocab, hidden],
    }
    for i in range(2):
        layer = f"{prefix}layers.{i}."
        for name, width in (("q", hidden), ("k", key_value), ("v", key_value)):
            shapes |= {
                f"{layer}self_attn.{name}_proj.weight": [width, hidden],
                f"{layer}self_attn.{name}_proj.bias": [width],
            }
        shapes |= {
            f"{layer}self_attn.o_proj.weight": [hidden, hidden],
            f"{layer}mlp.gate_proj.weight": [inner, hidden],
            f"{layer}mlp.up_proj.weight": [inner, hidden],
            f"{layer}mlp.down_proj.weight": [hidden, inner],
            f"{layer}input_layernorm.weight": [hidden],
            f"{layer}post_attention_layernorm.weight": [hidden],
        }
    return shapes


def _internvit(hidden: int, inner: int, layers: int, *, text_hidden: int) -> dict[str, list[int]]:
    shapes = {
        "vision_model.embeddings.class_embedding": [1, 1, hidden],
        "vision_model.embeddings.patch_embedding.weight": [hidden, 3, 14, 14],
        "vision_model.embeddings.patch_embedding.bias": [hidden],
        "vision_model.embeddings.position_embedding": [1, 1025, hidden],
        "mlp1.0.weight": [4 * hidden],
        "mlp1.0.bias": [4 * hidden],
        "mlp1.1.weight": [text_hidden, 4 * hidden],
        "mlp1.1.bias": [text_hidden],
        "mlp1.3.weight": [text_hidden, text_hidden],
        "mlp1.3.bias": [text_hidden],
    }
    for i in range(layers):
        layer = f"vision_model.encoder.layers.{i}."
        shapes |= {
            f"{layer}attn.qkv.weight": [3 * hidden, hidden],
            f"{layer}attn.qkv.bias": [3 * hidden],
            f"{layer}attn.proj.weight": [hidden, hidden],
            f"{layer}attn.proj.bias": [hidden],
            f"{layer}mlp.fc1.weight": [inner, hidden],
            f"{layer}mlp.fc1.bias": [inner],
            f"{layer}mlp.fc2.weight": [hidden, inner],
            f"{layer}mlp.fc2.bias": [hidden],
        }
        for name in ("ls1", "ls2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"{layer}{name}"] = [hidden]
    return shapes


def _internvl_hf() -> dict[str, list[int]]:
    hidden, inner, text = 64, 128, 128
    shapes = {
        "vision_tower.embeddings.cls_token": [1, 1, hidden],
        "vision_tower.embeddings.patch_embeddings.projection.weight": [hidden, 3, 14, 14],
        "vision_tower.embeddings.patch_embeddings.projection.bias": [hidden],
        "vision_tower.embeddings.position_embeddings": [1, 1025, hidden],
        "multi_modal_projector.layer_norm.weight": [4 * hidden],
        "multi_modal_projector.layer_norm.bias": [4 * hidden],
        "multi_modal_projector.linear_1.weight": [text, 4 * hidden],
        "multi_modal_projector.linear_1.bias": [text],
        "multi_modal_projector.linear_2.weight": [text, text],
        "multi_modal_projector.linear_2.bias": [text],
    }
    for i in range(2):
        layer = f"vision_tower.encoder.layer.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            shapes |= {
                f"{layer}attention.{name}.weight": [hidden, hidden],
                f"{layer}attention.{name}.bias": [hidden],
            }
        shapes |= {
            f"{layer}mlp.fc1.weight": [inner, hidden],
            f"{layer}mlp.fc1.bias": [inner],
            f"{layer}mlp.fc2.weight": [hidden, inner],
            f"{layer}mlp.fc2.bias": [hidden],
        }
        for side in ("before", "after"):
            shapes |= {
                f"{layer}layernorm_{side}.weight": [hidden],
                f"{layer}layernorm_{side}.bias": [hidden],
            }
        shapes |= {
            f"{layer}lambda_1": [hidden],
            f"{layer}lambda_2": [hidden],
        }
    return shapes


def _qwen2_vit() -> dict[str, list[int]]:
    hidden, inner, merged = 64, 256, 256
    shapes = {
        "visual.patch_embed.proj.weight": [hidden, 3, 2, 14, 14],
        "visual.merger.ln_q.weight": [hidden],
        "visual.merger.ln_q.bias": [hidden],
        "visual.merger.mlp.0.weight": [merged, merged],
        "visual.merger.mlp.0.bias": [merged],
        "visual.merger.mlp.2.weight": [128, merged],
        "visual.merger.mlp.2.bias": [128],
    }
    for i in range(2):
        block = f"visual.blocks.{i}."
        shapes |= {
            f"{block}attn.qkv.weight": [3 * hidden, hidden],
            f"{block}attn.qkv.bias": [3 * hidden],
            f"{block}attn.proj.weight": [hidden, hidden],
            f"{block}attn.proj.bias": [hidden],
            f"{block}mlp.fc1.weight": [inner, hidden],
            f"{block}mlp.fc1.bias": [inner],
            f"{block}mlp.fc2.weight": [hidden, inner],
            f"{block}mlp.fc2.bias": [hidden],
        }
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"{block}{name}"] = [hidden]
    return shapes


def _write(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    write_tokenizer(folder)
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> int:
    """A safetensors file with a real header over a hole; returns the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    return end


def write_tokenizer(folder: Path, more: Sequence[str] = ()) -> None:
    """Byte-level BPE without merges: a token a byte, the special ones, and ``more`` after them."""
    vocab = {letter: i for i, letter in enumerate(byte_alphabet())}
    special = {text: 256 + i for i, text in enumerate((*_SPECIAL, *more))}
    tokenizer = byte_level(vocab, special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "chat_template": _CHATML,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
