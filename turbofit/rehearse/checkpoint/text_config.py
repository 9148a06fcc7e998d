"""The language model's keys of `config.json` in header-only checkpoints."""

from __future__ import annotations

from typing import Any

from turbofit.core.json_types import JsonObject
from turbofit.core.model import MlaDims
from turbofit.rehearse.checkpoint.dims import (
    RehearsedDelta,
    RehearsedExperts,
    RehearsedText,
)
from turbofit.rehearse.checkpoint.longrope import minicpm3_config, phimoe_config

__all__ = ["delta_config", "text_config"]

_LLM_ARCH = {
    "internlm2": "InternLM2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
}


def text_config(t: RehearsedText, dtype: str) -> JsonObject:
    """The keys of a language model, alone or inside another model."""
    config = {
        "architectures": [_LLM_ARCH[t.arch]],
        "model_type": t.arch,
        "hidden_size": t.hidden,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "intermediate_size": t.inter,
        "vocab_size": t.vocab,
        "max_position_embeddings": t.positions,
        "rope_theta": t.rope_theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": t.tied,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if t.head_dim and t.mla is None:
        config["head_dim"] = t.head_dim
    if t.experts is not None:
        config |= _experts_config(t.experts)
    if t.arch == "minicpm3":
        config |= minicpm3_config(t)
    elif t.mla is not None:
        config |= _latent_config(t, t.mla)
    if t.arch == "deepseek":
        assert t.experts is not None
        config |= _deepseek_experts(t.experts) | {"norm_topk_prob": False, "moe_layer_freq": 1}
    if t.arch == "phimoe":
        config |= phimoe_config(t)
    if t.arch == "glm4_moe":
        assert t.experts is not None
        config |= {
            "attention_bias": True,
            "use_qk_norm": t.qk_norm,
            "partial_rotary_factor": 0.5,
            "routed_scaling_factor": 1.0,
        } | _deepseek_experts(t.experts)
    if t.drafting:
        config["num_nextn_predict_layers"] = t.drafting
    if t.arch == "gpt_oss":
        config |= {"attention_bias": True, "sliding_window": 128, "rope_theta": 150000.0}
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[i % 2] for i in range(t.layers)]
    if t.arch == "qwen3_next":
        assert t.delta is not None
        config |= delta_config(t, t.delta) | {"partial_rotary_factor": 0.25}
    if t.arch == "internlm2":
        config["bias"] = False  # a key of its own class, as published checkpoints have it
    return config


def _experts_config(e: RehearsedExperts) -> dict[str, Any]:
    """Experts in Mixtral's names and in Qwen3-MoE's."""
    return {
        "num_local_experts": e.count,
        "num_experts": e.count,
        "num_experts_per_tok": e.per_token,
        "moe_intermediate_size": e.inter,
        "shared_expert_intermediate_size": e.shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def delta_config(t: RehearsedText, d: RehearsedDelta) -> JsonObject:
    """Gated delta nets.

    Both keys say which layers have one: with one of them Transformers 5 drops the interval, which
    LMDeploy reads of Qwen3-Next.
    """
    return {
        "full_attention_interval": d.interval,
        "layer_types": [
            "linear_attention" if (i + 1) % d.interval else "full_attention"
            for i in range(t.layers)
        ],
        "linear_num_key_heads": d.key_heads,
        "linear_num_value_heads": d.value_heads,
        "linear_key_head_dim": d.key_dim,
        "linear_value_head_dim": d.value_dim,
        "linear_conv_kernel_dim": d.kernel,
    }


def _latent_config(t: RehearsedText, mla: MlaDims) -> dict[str, Any]:
    """Latent attention and its experts in DeepSeek's names; how experts are chosen too."""
    e = t.experts
    assert e is not None
    chosen: dict[str, Any] = {"scoring_func": "softmax", "topk_method": "greedy"}
    if e.correction:
        chosen = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    if t.arch == "glm4_moe_lite":
        del chosen["scoring_func"]  # which its class leaves out, and LMDeploy adds
    return (
        chosen
        | {
            "num_key_value_heads": t.heads,
            "q_lora_rank": mla.q_rank or None,
            "kv_lora_rank": mla.kv_rank,
            "qk_nope_head_dim": mla.nope_dim,
            "qk_rope_head_dim": mla.rope_dim,
            "v_head_dim": mla.v_dim,
            "moe_layer_freq": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
        }
        | _deepseek_experts(e)
    )


def _deepseek_experts(e: RehearsedExperts) -> dict[str, Any]:
    """Experts behind the first layers, in DeepSeek's keys."""
    return {
        "first_k_dense_replace": e.dense,
        "n_routed_experts": e.count,
        "n_shared_experts": e.shared // e.inter or None,
    }
