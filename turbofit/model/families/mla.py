"""Multi-head latent attention and the experts beside it: DeepSeek-V2, V3 and GLM-4-MoE-Lite."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from turbofit.core.model import MlaDims, MoeDims
from turbofit.model.config import Section

__all__ = ["read_expanded", "read_latent_experts", "read_mla", "routed_experts"]

#: Whose experts no bias helps to choose where ``topk_method`` is absent.
_GREEDY: Final = frozenset({"DeepseekForCausalLM", "DeepseekV2ForCausalLM"})
_NO_DEFAULTS: Final[Mapping[str, int]] = MappingProxyType({})


def read_mla(config: Section) -> MlaDims:
    """Dims of the latents, which every published config names."""
    return MlaDims(
        kv_rank=config.integer("kv_lora_rank", high=1 << 16),
        nope_dim=config.integer("qk_nope_head_dim", high=1 << 12),
        rope_dim=config.integer("qk_rope_head_dim", high=1 << 12),
        v_dim=config.integer("v_head_dim", high=1 << 12),
        q_rank=config.integer("q_lora_rank", high=1 << 16) if "q_lora_rank" in config else 0,
    )


def read_expanded(config: Section, hidden: int, heads: int) -> MlaDims:
    """Latents of which LMDeploy caches what they expand to (MiniCPM3).

    Absent keys take the defaults of its config class. Source: LMDeploy models/minicpm3.py.

    Raises:
        UsageError: dims that LMDeploy's class does not run.
    """
    values = hidden // heads
    for key, only in (("v_head_dim", values), ("num_key_value_heads", heads)):
        if config.integer(key, only) != only:
            raise config.error(key, f"is not {only}, as LMDeploy takes it")
    if "q_lora_rank" in config.values and config.values["q_lora_rank"] is None:
        raise config.error("q_lora_rank", "is null, which LMDeploy does not run")
    return MlaDims(
        kv_rank=config.integer("kv_lora_rank", 256, high=1 << 16),
        nope_dim=config.integer("qk_nope_head_dim", 64, high=1 << 12),
        rope_dim=config.integer("qk_rope_head_dim", 32, high=1 << 12),
        v_dim=values,
        q_rank=config.integer("q_lora_rank", 768, high=1 << 16),
        expanded=True,
    )


def read_latent_experts(config: Section, architecture: str, layers: int) -> MoeDims | None:
    """The experts of all layers but the first dense ones; None where there are none.

    Biases that only choose experts are there by ``topk_method``, and in V3's and GLM's classes
    where that is absent.
    """
    if "n_routed_experts" not in config:
        return None
    dense = config.integer("first_k_dense_replace", 0, low=0, high=1 << 10)
    kinds = config.strings("mlp_layer_types")
    if kinds:
        dense = len(kinds) - kinds.count("sparse")
    if config.integer("moe_layer_freq", 1, high=1 << 10) != 1 or "sparse" in kinds[:dense]:
        raise config.error("moe_layer_freq", "has dense layers behind the first, of no account")
    if dense >= layers:
        return None
    default = "greedy" if architecture in _GREEDY else "noaux_tc"
    correction = config.string("topk_method", default) == "noaux_tc"
    return routed_experts(config, layers - dense, correction=correction)


def routed_experts(
    config: Section, layers: int, *, correction: bool, defaults: Mapping[str, int] = _NO_DEFAULTS
) -> MoeDims:
    """Experts of so many layers, in DeepSeek's keys; shared ones are one MLP of their widths' sum.

    Args:
        config: of the language model.
        layers: that have them.
        correction: whether biases help to choose.
        defaults: of keys that may be absent; no shared experts by default.
    """
    per_token = config.integer(
        "num_experts_per_tok", defaults.get("num_experts_per_tok"), high=1 << 10
    )
    inter = config.integer(
        "moe_intermediate_size", defaults.get("moe_intermediate_size"), high=1 << 20
    )
    return MoeDims(
        experts=config.integer(
            "n_routed_experts", defaults.get("num_experts"), low=per_token, high=1 << 13
        ),
        experts_per_token=per_token,
        intermediate=inter,
        layers=layers,
        shared_intermediate=inter
        * config.integer("n_shared_experts", defaults.get("shared_experts", 0), high=1 << 10),
        shared_gate=False,
        correction=correction,
    )
