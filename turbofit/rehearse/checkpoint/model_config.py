"""``config.json`` of header-only checkpoints."""

from __future__ import annotations

from typing import Any

from turbofit.core.json_types import JsonObject
from turbofit.rehearse.checkpoint.dims import (
    RehearsedModel,
)
from turbofit.rehearse.checkpoint.text_config import delta_config, text_config
from turbofit.rehearse.checkpoint.tokenizer import special_tokens

__all__ = ["config_of"]

_PACKINGS: dict[str, dict[str, Any]] = {
    "awq": {
        "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
    },
    "fp8": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True,
                "dynamic": False, "type": "int",
            },
        }},
    },
}  # fmt: skip


def _internvl_config(model: RehearsedModel) -> dict[str, Any]:
    v = model.vision
    assert v is not None
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": v.image,
        "max_dynamic_patch": model.max_tiles,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat" if model.text.arch == "internlm2" else "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": model.dtype,
        "use_thumbnail": True,
        "llm_config": text_config(model.text, model.dtype),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": v.hidden,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "intermediate_size": v.inter,
            "image_size": v.image,
            "patch_size": v.patch,
            "num_channels": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "initializer_factor": 1.0,  # published ones name it, and vLLM reads it
            "norm_type": "rms_norm" if v.rms_norm else "layer_norm",
            "qk_normalization": v.qk_norm,
            "qkv_bias": v.qkv_bias,
            "torch_dtype": model.dtype,
        },
    }


def _internvl_hf_config(model: RehearsedModel) -> dict[str, Any]:
    v = model.vision
    assert v is not None
    return {
        "architectures": [f"Intern{'S1' if model.intern_s1 else 'VL'}ForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_seq_length": (v.image // v.patch // 2) ** 2,
        "image_token_id": special_tokens(model)["<IMG_CONTEXT>"],
        "tie_word_embeddings": False,
        "torch_dtype": model.dtype,
        "text_config": text_config(model.text, model.dtype),
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": v.hidden,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "intermediate_size": v.inter,
            "image_size": [v.image, v.image],
            "patch_size": [v.patch, v.patch],
            "num_channels": 3,
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "use_qk_norm": v.qk_norm,
            "attention_bias": v.qkv_bias,
            "torch_dtype": model.dtype,
        },
    }


def _qwen_config(model: RehearsedModel) -> dict[str, Any]:
    v, t = model.vision, model.text
    assert v is not None
    first = v.kind == "qwen2"
    name = "Qwen2VL" if first else "Qwen2_5_VL"
    vision: dict[str, Any] = {
        "depth": v.layers,
        "num_heads": v.heads,
        "patch_size": v.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_chans": 3,
    }
    if first:
        vision |= {
            "embed_dim": v.hidden,
            "hidden_size": t.hidden,
            "mlp_ratio": 4,
            "model_type": "qwen2_vl",
        }
    else:
        vision |= {
            "hidden_size": v.hidden,
            "out_hidden_size": t.hidden,
            "window_size": 112,
            "intermediate_size": v.inter,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "model_type": "qwen2_5_vl",
        }
    half = t.dim // 2  # of which time, height and width each turn a part
    return text_config(t, model.dtype) | {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": vision["model_type"],
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
        },
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_config": vision,
    }


def _qwen3_vl_config(model: RehearsedModel) -> dict[str, Any]:
    v, t = model.vision, model.text
    assert v is not None
    mrope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    text = text_config(t, model.dtype)
    kind = "qwen3_vl_moe" if t.experts else "qwen3_vl"
    return {
        "architectures": [f"Qwen3VL{'Moe' if t.experts else ''}ForConditionalGeneration"],
        "model_type": kind,
        "tie_word_embeddings": t.tied,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "text_config": text | {"model_type": f"{kind}_text", "rope_scaling": mrope},
        "vision_config": {
            "model_type": kind,
            "depth": v.layers,
            "hidden_size": v.hidden,
            "intermediate_size": v.inter,
            "num_heads": v.heads,
            "out_hidden_size": t.hidden,
            "patch_size": v.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "num_position_embeddings": (v.image // v.patch) ** 2,
            "deepstack_visual_indexes": [
                (i + 1) * v.layers // (v.deepstack + 1) for i in range(v.deepstack)
            ],
        },
    }


def _at_16_bits(model: RehearsedModel) -> list[str]:
    """What published checkpoints in fp8 exempt: the tower's layers, and routers."""
    v, layers = model.vision, range(model.text.layers)
    assert v is not None
    parts = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    tower = [f"model.visual.blocks.{i}.{part}" for i in range(v.layers) for part in parts]
    return [*tower, *(f"model.language_model.layers.{i}.mlp.gate" for i in layers)]


def _intern_s1_pro_config(model: RehearsedModel) -> dict[str, Any]:
    """Qwen3-VL's keys, with a position encoding of its own."""
    config = _qwen3_vl_config(model)
    text = config["text_config"] | {
        "model_type": "qwen3_vl_moe_text",
        "rope_scaling": {
            "rope_type": "default",
            "fope_sep_head": True,
            "num_inv_freq": model.text.fourier,
        },
    }
    return config | {
        "architectures": ["InternS1ProForConditionalGeneration"],
        "model_type": "interns1_pro",
        "text_config": text,
    }


def _qwen2_5_halves(model: RehearsedModel) -> dict[str, Any]:
    """Qwen2.5-VL's halves, the language model's keys by themselves."""
    config = _qwen_config(model)
    text = text_config(model.text, model.dtype)
    text["rope_scaling"] = config["rope_scaling"] | {"type": "default"}
    special = special_tokens(model)
    ids = {f"{one}_token_index": special[f"<|{one}_pad|>"] for one in ("image", "video", "audio")}
    for around in ("vision_start", "vision_end", "audio_start", "audio_end"):
        ids[f"{around}_token_id"] = special[f"<|{around}|>"]
    return ids | {"text_config": text, "vision_config": config["vision_config"]}


def _qwen3_halves(model: RehearsedModel) -> dict[str, Any]:
    """Qwen3-VL's halves."""
    config = _qwen3_vl_config(model)
    kept = ("image_token_id", "video_token_id", "text_config", "vision_config")
    halves = {key: config[key] for key in kept}
    return halves | {"audio_token_id": special_tokens(model)["<|audio_pad|>"]}


def _omni_config(model: RehearsedModel) -> dict[str, Any]:
    """A Qwen-VL's halves in a thinker, with the audio tower."""
    assert model.vision is not None
    audio, second = model.vision.audio, model.vision.kind == "qwen2_5"
    assert audio is not None
    kind = "qwen2_5_omni" if second else "qwen3_omni_moe"
    thinker = _qwen2_5_halves(model) if second else _qwen3_halves(model)
    thinker["text_config"] |= {"model_type": f"{kind}_text"}
    thinker["vision_config"] |= {"model_type": f"{kind}_vision_encoder"}
    sound = {
        "model_type": f"{kind}_audio_encoder",
        "num_mel_bins": audio.mel_bins,
        "encoder_layers": audio.layers,
        "encoder_attention_heads": audio.heads,
        "encoder_ffn_dim": audio.intermediate,
        "d_model": audio.hidden,
        "output_dim": model.text.hidden,
        "max_source_positions": audio.positions,
    }
    if audio.channels:
        sound["downsample_hidden_size"] = audio.channels
    thinker |= {"model_type": f"{kind}_thinker", "dtype": model.dtype, "audio_config": sound}
    return {
        "architectures": ["Qwen2_5OmniModel" if second else "Qwen3OmniMoeForConditionalGeneration"],
        "model_type": kind,
        "dtype": model.dtype,
        "enable_audio_output": False,
        "thinker_config": thinker,
    }


def _kimi_config(model: RehearsedModel) -> dict[str, Any]:
    """The keys of its own config class; those of the tower have a prefix."""
    v = model.vision
    assert v is not None
    side = v.image // v.patch
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": model.dtype,
        "tie_word_embeddings": False,
        "media_placeholder_token_id": special_tokens(model)["<|media_pad|>"],
        "text_config": text_config(model.text, model.dtype),
        "vision_config": {
            "patch_size": v.patch,
            "init_pos_emb_height": side,
            "init_pos_emb_width": side,
            "init_pos_emb_time": 4,
            "pos_emb_type": "divided_fixed",
            "merge_kernel_size": [2, 2],
            "merge_type": "sd2_tpool",
            "video_attn_type": "spatial_temporal",
            "vt_hidden_size": v.hidden,
            "vt_num_hidden_layers": v.layers,
            "vt_num_attention_heads": v.heads,
            "vt_intermediate_size": v.inter,
            "mm_hidden_size": v.hidden,
            "text_hidden_size": model.text.hidden,
            "projector_ln_eps": 1e-5,
        },
    }


def _qwen3_5_config(model: RehearsedModel) -> dict[str, Any]:
    """Qwen3-VL's keys and tower, before a decoder of gated delta nets."""
    t, moe = model.text, "_moe" if model.text.experts else ""
    d = t.delta
    assert d is not None
    config = _qwen3_vl_config(model)
    rope = {
        "rope_type": "default",
        "rope_theta": t.rope_theta,
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
    }
    text = config["text_config"] | {
        "model_type": f"qwen3_5{moe}_text",
        "attn_output_gate": True,
        "rope_parameters": rope,
    }
    text |= delta_config(t, d)
    for key in ("rope_scaling", "rope_theta"):
        text.pop(key)
    vision = config["vision_config"] | {"model_type": f"qwen3_5{moe}"}
    return config | {
        "architectures": [
            model.architecture or f"Qwen3_5{'Moe' if moe else ''}ForConditionalGeneration"
        ],
        "model_type": f"qwen3_5{moe}",
        "text_config": text,
        "vision_config": vision,
    }


def config_of(model: RehearsedModel) -> JsonObject:
    """The ``config.json`` of a model."""
    if model.vision is None:
        config = text_config(model.text, model.dtype)
    elif model.vision.kind == "internvit":
        config = _internvl_config(model)
    elif model.vision.kind == "internvit_hf":
        config = _internvl_hf_config(model)
    elif model.vision.kind == "moonvit":
        config = _kimi_config(model)
    elif model.text.delta is not None:
        config = _qwen3_5_config(model)
    elif model.text.fourier:
        config = _intern_s1_pro_config(model)
    elif model.vision.audio is not None:
        config = _omni_config(model)
    elif model.vision.kind == "qwen3":
        config = _qwen3_vl_config(model)
    else:
        config = _qwen_config(model)
    if model.packing:
        inner = config.get("llm_config", config)
        if model.text.arch == "kimi_k2":
            inner = config["text_config"]
        inner["quantization_config"] = dict(_PACKINGS[model.packing])
    if model.packing == "fp8" and model.text.fourier:
        config["quantization_config"]["modules_to_not_convert"] = _at_16_bits(model)
    return config
