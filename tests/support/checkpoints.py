"""Makes tiny checkpoints offline: real file formats, real tensor names, random nothing inside.

Dims are small, the image rules are the published ones. Tensors are those that a rehearsal writes of
such a model, and the tokenizer is the stand-in of rehearsals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.safetensors_file import write_safetensors
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.tokenizer import byte_alphabet, byte_level
from turbofit.rehearsal.checkpoint.twin import tensors, twin_of, write_model

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
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
        "llm_config": TEXT,
        "max_dynamic_patch": max_dynamic_patch,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "Hermes-2",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }
    return write(folder, config)


def make_internvl_hf(folder: Path) -> Path:
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
        "text_config": TEXT,
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
        "max_patches": 12,
        "size": {"height": 448, "width": 448},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
    }
    outer = {"image_seq_length": 256, "processor_class": "InternVLProcessor"}
    write(folder, config, preprocessor_config=processor, processor_config=outer)
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
        **TEXT,
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
    return write(folder, config, preprocessor_config=processor)


def make_text(folder: Path) -> Path:
    """Qwen2 without images."""
    return write(folder, TEXT)


def write(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> Path:
    """Write these files, and the tensors of such a model."""
    write_files(folder, config=config, **files)
    twin = twin_of(resolve_model(str(folder)))
    found = {name: (dtype, shape) for name, dtype, shape in tensors(twin)}
    write_safetensors(folder / "model.safetensors", found)
    return folder


def write_files(folder: Path, **files: dict[str, Any]) -> None:
    """These JSON files, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=1))


def write_checkpoint(name: str, folder: Path) -> Path:
    """The stand-in of a preset."""
    return write_model(twin_of(preset_model(name)), folder)


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
