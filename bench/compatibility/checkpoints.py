"""Tiny checkpoints whose ``config.json`` has the keys of the published ones, and no weights.

LMDeploy's front ends read nothing else. They are written by hand: Transformers' own classes would
write them in the format of one version, and the bench asks how each version reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.support.checkpoints import (
    make_internvl2,
    make_internvl_hf,
    make_qwen2_vl,
    write_tokenizer,
)
from tests.support.checkpoints_eva import make_cogvlm, make_glm4v
from tests.support.checkpoints_llava import make_llava

__all__ = ["CHECKPOINTS", "Maker"]

Maker = Callable[[Path], Path]

_QWEN_TEXT: Final[dict[str, Any]] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 256, "dtype": "bfloat16",
    "eos_token_id": 258, "head_dim": 128, "hidden_act": "silu", "hidden_size": 256,
    "initializer_range": 0.02, "intermediate_size": 512, "max_position_embeddings": 262144,
    "num_attention_heads": 2, "num_hidden_layers": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "use_cache": True, "vocab_size": 512,
}  # fmt: skip
_QWEN_IDS: Final = {
    "vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 262,
    "video_token_id": 263,
}  # fmt: skip
_QWEN3_VISION: Final[dict[str, Any]] = {
    "deepstack_visual_indexes": [0], "depth": 2, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 128,
    "num_heads": 1, "num_position_embeddings": 2304, "out_hidden_size": 256, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_EXPERTS: Final = {
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 128,
    "norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
_HALVES: Final = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_GLM_TOKENS: Final = ("<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>")
_OMNI_TOKENS: Final = ("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
_OMNI_ROLES: Final = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
}  # fmt: skip
_GEMMA_TOKENS: Final = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
_LLAMA_TOKENS: Final = (
    "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)  # fmt: skip


def qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL with heads of 64, as TurboMind needs them."""
    made = make_qwen2_vl(folder)
    config = json.loads((made / "config.json").read_text())
    config["vision_config"] |= {"num_heads": 1, "embed_dim": 64, "model_type": "qwen2_vl"}
    (made / "config.json").write_text(json.dumps(config))
    return made


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: Qwen2-VL's processor before a tower with windows."""
    made = make_qwen2_vl(folder)
    config = json.loads((made / "config.json").read_text())
    config |= {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 2, "hidden_act": "silu", "hidden_size": 160, "intermediate_size": 128,
            "num_heads": 2, "in_chans": 3, "out_hidden_size": 128, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    (made / "config.json").write_text(json.dumps(config))
    processor = json.loads((made / "preprocessor_config.json").read_text())
    processor["processor_class"] = "Qwen2_5_VLProcessor"
    (made / "preprocessor_config.json").write_text(json.dumps(processor))
    return made


def qwen3_vl(folder: Path, *, experts: bool = False) -> Path:
    """Qwen3-VL, with experts too."""
    kind = "qwen3_vl_moe" if experts else "qwen3_vl"
    scaling = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = {**_QWEN_TEXT, "model_type": f"{kind}_text", "rope_theta": 5000000}
    text |= {"rope_scaling": scaling, **(_EXPERTS if experts else {})}
    config = {
        "architectures": [f"Qwen3VL{'Moe' if experts else ''}ForConditionalGeneration"],
        "model_type": kind, "text_config": text, "tie_word_embeddings": False, **_QWEN_IDS,
        "vision_config": {**_QWEN3_VISION, "model_type": kind},
    }  # fmt: skip
    return _write(folder, config, "Qwen3VL", _qwen3_processor())


def qwen3_5(folder: Path, *, experts: bool = False) -> Path:
    """Qwen3.5, with experts too: three delta nets and one attention."""
    kind = "qwen3_5_moe" if experts else "qwen3_5"
    text = {
        **_QWEN_TEXT, "model_type": f"{kind}_text", "attn_output_gate": True,
        "full_attention_interval": 4, "mamba_ssm_dtype": "float32",
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 64, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_value_head_dim": 64, "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
            "rope_theta": 10000000, "partial_rotary_factor": 0.25,
        },
    }  # fmt: skip
    if experts:
        text |= {**_EXPERTS, "shared_expert_intermediate_size": 128}
    config = {
        "architectures": [f"Qwen3_5{'Moe' if experts else ''}ForConditionalGeneration"],
        "model_type": kind, "text_config": text, "tie_word_embeddings": False, **_QWEN_IDS,
        "vision_config": {**_QWEN3_VISION, "deepstack_visual_indexes": [], "model_type": kind},
    }  # fmt: skip
    return _write(folder, config, "Qwen3VL", _qwen3_processor())


def qwen3_omni(folder: Path) -> Path:
    """Qwen3-Omni's thinker, as published without its talker."""
    kind = "qwen3_omni_moe"
    scaling = {"interleaved": True, "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    scaling |= {"rope_type": "default", "type": "default"}
    text = {key: value for key, value in _QWEN_TEXT.items() if not key.endswith("os_token_id")}
    text |= {**_EXPERTS, "model_type": f"{kind}_text", "rope_scaling": scaling}
    ids = {f"{role}_token_id": 264 + i for i, role in enumerate(("audio_start", "audio_end"))}
    thinker = {
        **_QWEN_IDS, **ids, "audio_token_id": 266, "model_type": f"{kind}_thinker",
        "dtype": "bfloat16", "position_id_per_seconds": 13, "text_config": text,
        "vision_config": {
            **_QWEN3_VISION, "model_type": f"{kind}_vision_encoder", "image_size": 768,
        },
        "audio_config": {
            "model_type": f"{kind}_audio_encoder", "d_model": 64, "encoder_layers": 2,
            "encoder_attention_heads": 1, "encoder_ffn_dim": 128, "num_mel_bins": 128,
            "output_dim": 256, "downsample_hidden_size": 16, "max_source_positions": 1500,
        },
    }  # fmt: skip
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": kind,
        "enable_audio_output": False, "thinker_config": thinker,
    }  # fmt: skip
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136,
        "max_pixels": 12845056, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128, **_HALVES,
    }  # fmt: skip
    made = _write(folder, config, "Qwen3OmniMoe", processor, _OMNI_TOKENS)
    path = made / "tokenizer_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "extra_special_tokens": _OMNI_ROLES, **_OMNI_ROLES}))
    return made


def glm4_1v(folder: Path) -> Path:
    """GLM-4.1V as published first: the language model's keys beside the others."""
    text = {key: value for key, value in _QWEN_TEXT.items() if key not in ("dtype", "head_dim")}
    config = {
        **text, "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v",
        "attention_bias": True, "hidden_size": 256, "torch_dtype": "bfloat16", "pad_token_id": 0,
        "eos_token_id": [258], "image_start_token_id": 259, "image_end_token_id": 260,
        "image_token_id": 267, "video_token_id": 268, "video_start_token_id": 269,
        "video_end_token_id": 270, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "max_position_embeddings": 65536,
        "rope_scaling": {"type": "default", "mrope_section": [8, 12, 12]},
        "vision_config": {
            "hidden_size": 64, "depth": 2, "num_heads": 1, "attention_bias": False,
            "intermediate_size": 128, "hidden_act": "silu", "hidden_dropout_prob": 0.0,
            "initializer_range": 0.02, "image_size": 336, "patch_size": 14,
            "out_hidden_size": 256, "rms_norm_eps": 1e-05, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "Glm4vImageProcessor", "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "size": {"shortest_edge": 12544, "longest_edge": 9633792},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    return _write(folder, config, "Glm4v", processor, _GLM_TOKENS)


def gemma3(folder: Path) -> Path:
    """Gemma 3: most of the language model's keys are left to the class's defaults."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "boi_token_index": 268, "eoi_token_index": 269, "eos_token_id": [258],
        "image_token_index": 267, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 256, "intermediate_size": 512, "model_type": "gemma3_text",
            "num_hidden_layers": 4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 64, "image_size": 896, "intermediate_size": 128, "patch_size": 14,
            "model_type": "siglip_vision_model", "num_attention_heads": 1,
            "num_hidden_layers": 2, "vision_use_head": False,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256, **_HALVES,
        "size": {"height": 896, "width": 896}, "do_rescale": True, "rescale_factor": 1 / 255,
        "resample": 2,
    }  # fmt: skip
    made = _write(folder, config, "Gemma3", processor, _GEMMA_TOKENS)
    path = made / "tokenizer_config.json"
    keys = ("image_token", "boi_token", "eoi_token")
    extra = {"extra_special_tokens": dict(zip(keys, _GEMMA_TOKENS, strict=True))}
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    outer = {"processor_class": "Gemma3Processor", "image_seq_length": 256}
    (made / "processor_config.json").write_text(json.dumps(outer))
    return made


def llama4(folder: Path) -> Path:
    """Llama 4: experts in every layer, as Scout has them."""
    config = {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
        "boi_token_index": 268, "eoi_token_index": 269, "image_token_index": 270,
        "text_config": {
            "_attn_implementation_autoset": True, "attention_bias": False,
            "attention_chunk_size": 8192, "attention_dropout": 0.0, "bos_token_id": 256,
            "eos_token_id": [258], "for_llm_compressor": False, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 256, "initializer_range": 0.02,
            "interleave_moe_layer_step": 1, "intermediate_size": 256, "intermediate_size_mlp": 512,
            "max_position_embeddings": 10485760, "model_type": "llama4_text", "no_rope_layers": [],
            "num_attention_heads": 4, "num_experts_per_tok": 1, "num_hidden_layers": 4,
            "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": False,
            "pad_token_id": 257, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "torch_dtype": "bfloat16",
            "use_cache": True, "use_qk_norm": True, "vocab_size": 512,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 64, "image_size": 336,
            "initializer_range": 0.02, "intermediate_size": 256,
            "model_type": "llama4_vision_model",
            "multi_modal_projector_bias": False, "norm_eps": 1e-05, "num_attention_heads": 1,
            "num_channels": 3, "num_hidden_layers": 2, "patch_size": 14, "pixel_shuffle_ratio": 0.5,
            "projector_dropout": 0.0, "projector_input_dim": 256, "projector_output_dim": 256,
            "rope_theta": 10000, "vision_feature_layer": -1, "vision_output_dim": 256,
            "vision_feature_select_strategy": "default",
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "Llama4ImageProcessorFast", "max_patches": 16, **_HALVES,
        "size": {"height": 336, "width": 336}, "do_rescale": True, "rescale_factor": 1 / 255,
        "resample": 2, "resize_to_max_canvas": False,
    }  # fmt: skip
    made = _write(folder, config, "Llama4", processor, _LLAMA_TOKENS)
    outer = {"fake_image_token": "<|image|>", "image_token": "<|image|>", "patch_size": 14}
    outer |= {"downsample_factor": 2, "pixel_shuffle_ratio": 0.5}
    outer |= {"processor_class": "Llama4Processor"}
    (made / "processor_config.json").write_text(json.dumps(outer))
    return made


def _qwen3_processor() -> dict[str, Any]:
    size = {"longest_edge": 16777216, "shortest_edge": 65536}
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast", "size": size, "patch_size": 16,
        "temporal_patch_size": 2, "merge_size": 2, **_HALVES,
    }  # fmt: skip


def _write(
    folder: Path,
    config: dict[str, Any],
    name: str,
    processor: dict[str, Any],
    tokens: Sequence[str] = (),
) -> Path:
    """A folder with a config, a processor of Transformers and the stand-in tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, tokens)
    values = {**processor, "processor_class": f"{name}Processor"}
    video = {**values, "video_processor_type": f"{name}VideoProcessor"}
    video.pop("image_processor_type")
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    if name in ("Qwen3VL", "Glm4v"):
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


#: By ``architectures[0]``: every family of docs/models.md that an engine of LMDeploy runs, and
#: LLaVA-NeXT. Phi-3-vision's processor and InternVLChatModel's config class are remote code.
CHECKPOINTS: Final[dict[str, Maker]] = {
    "InternVLChatModel": make_internvl2,
    "InternVLForConditionalGeneration": make_internvl_hf,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "Qwen3VLMoeForConditionalGeneration": lambda folder: qwen3_vl(folder, experts=True),
    "Qwen3_5ForConditionalGeneration": qwen3_5,
    "Qwen3_5MoeForConditionalGeneration": lambda folder: qwen3_5(folder, experts=True),
    "Qwen3OmniMoeForConditionalGeneration": qwen3_omni,
    "Glm4vForConditionalGeneration": glm4_1v,
    "LlavaForConditionalGeneration": make_llava,
    "LlavaNextForConditionalGeneration": lambda folder: make_llava(folder, "llava_next"),
    "Llama4ForConditionalGeneration": llama4,
    "Gemma3ForConditionalGeneration": gemma3,
    "CogVLMForCausalLM": make_cogvlm,
    "ChatGLMModel": make_glm4v,
}
