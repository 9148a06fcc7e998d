"""Tiny checkpoints with an EVA-CLIP tower: CogVLM, CogVLM2 and GLM-4V, real names, random nothing.

Their image rules are the published ones: 490 pixels and 1227 tokens, 1344 and 2306, 1120 and 1602.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.checkpoints import write, write_files
from tests.support.safetensors_file import write_safetensors

_HIDDEN, _INNER, _VISION, _WIDE = 128, 256, 64, 96


def make_cogvlm(folder: Path, *, second: bool = False) -> Path:
    """CogVLM, or CogVLM2 where ``second``; the config class is remote code."""
    config: dict[str, Any] = {
        "architectures": ["CogVLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_cogvlm.CogVLMConfig",
            "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
        },
        "bos_token_id": 256,
        "eos_token_id": 258,
        "hidden_act": "silu",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "max_position_embeddings": 2048,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 512,
        "vision_config": _vision(1344 if second else 490),
    }
    if second:
        config["num_multi_query_heads"] = 1
    return write(folder, config)


def make_glm4v(folder: Path) -> Path:
    """GLM-4V in its authors' format, tokenizer and config class of remote code."""
    config = {
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "boi_token_id": 259,
        "eoi_token_id": 260,
        "pad_token_id": 256,
        "eos_token_id": [258],
        "ffn_hidden_size": _INNER,
        "fp32_residual_connection": False,
        "hidden_size": _HIDDEN,
        "kv_channels": 64,
        "layernorm_epsilon": 1.5625e-07,
        "multi_query_attention": True,
        "multi_query_group_num": 1,
        "num_attention_heads": 2,
        "num_layers": 2,
        "original_rope": True,
        "padded_vocab_size": 512,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": 1,
        "seq_length": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 512,
        "vision_config": _vision(1120) | {"scaling_factor": 8},
    }
    shapes = {
        "transformer.embedding.word_embeddings.weight": [512, _HIDDEN],
        "transformer.encoder.final_layernorm.weight": [_HIDDEN],
        "transformer.output_layer.weight": [512, _HIDDEN],
        "transformer.rotary_pos_emb.inv_freq": [16],
        **_tower("transformer.vision.", 6401),
    }
    for i in range(2):
        layer = f"transformer.encoder.layers.{i}."
        shapes |= {
            f"{layer}self_attention.query_key_value.weight": [2 * _HIDDEN, _HIDDEN],
            f"{layer}self_attention.query_key_value.bias": [2 * _HIDDEN],
            f"{layer}self_attention.dense.weight": [_HIDDEN, _HIDDEN],
            f"{layer}mlp.dense_h_to_4h.weight": [2 * _INNER, _HIDDEN],
            f"{layer}mlp.dense_4h_to_h.weight": [_HIDDEN, _INNER],
            f"{layer}input_layernorm.weight": [_HIDDEN],
            f"{layer}post_attention_layernorm.weight": [_HIDDEN],
        }
    write_files(folder, config=config)
    tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
    path.write_text(json.dumps(tokenizer))
    return folder


def _vision(size: int) -> dict[str, Any]:
    return {
        "dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_size": _VISION,
        "image_size": size,
        "in_channels": 3,
        "intermediate_size": _WIDE,
        "layer_norm_eps": 1e-6,
        "num_heads": 1,
        "num_hidden_layers": 2,
        "num_positions": (size // 14) ** 2 + 1,
        "patch_size": 14,
    }


def _tower(prefix: str, positions: int) -> dict[str, list[int]]:
    """EVA-CLIP, with the convolution of GLM-4V."""
    shapes = {
        f"{prefix}boi": [1, 1, _HIDDEN],
        f"{prefix}eoi": [1, 1, _HIDDEN],
        f"{prefix}patch_embedding.cls_embedding": [1, _VISION],
        f"{prefix}patch_embedding.proj.weight": [_VISION, 3, 14, 14],
        f"{prefix}patch_embedding.proj.bias": [_VISION],
        f"{prefix}patch_embedding.position_embedding.weight": [positions, _VISION],
        f"{prefix}linear_proj.linear_proj.weight": [_HIDDEN, _HIDDEN],
        f"{prefix}linear_proj.norm1.weight": [_HIDDEN],
        f"{prefix}linear_proj.norm1.bias": [_HIDDEN],
        f"{prefix}linear_proj.dense_h_to_4h.weight": [_INNER, _HIDDEN],
        f"{prefix}linear_proj.gate_proj.weight": [_INNER, _HIDDEN],
        f"{prefix}linear_proj.dense_4h_to_h.weight": [_HIDDEN, _INNER],
        f"{prefix}conv.weight": [_HIDDEN, _VISION, 2, 2],
        f"{prefix}conv.bias": [_HIDDEN],
    }
    parts = {
        "attention.query_key_value": [3 * _VISION, _VISION], "attention.dense": [_VISION, _VISION],
        "mlp.fc1": [_WIDE, _VISION], "mlp.fc2": [_VISION, _WIDE],
        "input_layernorm": [_VISION], "post_attention_layernorm": [_VISION],
    }  # fmt: skip
    for i in range(2):
        for name, shape in parts.items():
            shapes[f"{prefix}transformer.layers.{i}.{name}.weight"] = shape
            shapes[f"{prefix}transformer.layers.{i}.{name}.bias"] = shape[:1]
    return shapes
