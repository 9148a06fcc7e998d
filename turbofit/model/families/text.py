"""Reads language models: dimensions from config.json, with each config class's defaults.

Engines read config.json through Transformers' classes; for InternLM, through the published remote
code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from msgspec import UNSET, UnsetType

from turbofit.core.model import DeltaDims, MlaDims, MoeDims, TextDims
from turbofit.core.presets import load_yaml, preset_path
from turbofit.model.config import Section

#: Language models with an account; text.yaml also has language models inside vision models.
TEXT_ARCHITECTURES: Final = frozenset(
    {
        "DeepseekForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
        "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM",
        "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "GptOssForCausalLM",
        "InternLM2ForCausalLM", "InternLM3ForCausalLM", "LlamaForCausalLM", "MiniCPM3ForCausalLM",
        "MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM",
        "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
    }
)  # fmt: skip

_GPT_OSS: Final = "GptOssForCausalLM"
_GLM_MOE: Final = "Glm4MoeForCausalLM"
_PHI_MOE: Final = "PhiMoEForCausalLM"
#: The key with the number of layers that propose tokens.
_DRAFT_LAYERS: Final = {
    **dict.fromkeys(
        (_GLM_MOE, "Glm4MoeLiteForCausalLM", "DeepseekV3ForCausalLM"), "num_nextn_predict_layers"
    ),
    "Qwen3_5TextModel": "mtp_num_hidden_layers",
    "Qwen3_5MoeTextModel": "mtp_num_hidden_layers",
}
_ATTENTION_BIAS: Final = ("attention_bias", False)
#: Whether three kinds of layers have biases, by architecture: queries, keys and values together;
#: then outputs; then MLPs. Each entry is a key of the config with its default, or a fixed value.
_BIASES: Final[dict[str, tuple[bool | tuple[str, bool], ...]]] = {
    "LlamaForCausalLM": (_ATTENTION_BIAS, _ATTENTION_BIAS, ("mlp_bias", False)),
    "InternLM2ForCausalLM": (("bias", True), ("bias", True), False),
    "InternLM3ForCausalLM": (("qkv_bias", False), ("bias", False), ("bias", False)),
    "Qwen2MoeForCausalLM": (("qkv_bias", True), False, False),
    **dict.fromkeys(
        ("Qwen2ForCausalLM", "Qwen2VLTextModel", "Qwen2_5OmniTextModel", "Glm4vTextModel"),
        (True, False, False),
    ),
    **dict.fromkeys(
        ("MixtralForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "CogVLMForCausalLM",
         "MllamaForCausalLM"),
        (False, False, False),
    ),
    **dict.fromkeys(("Glm4ForCausalLM", _GLM_MOE), (_ATTENTION_BIAS, False, False)),
    _GPT_OSS: (("attention_bias", True), ("attention_bias", True), True),
}  # fmt: skip

#: The models of ``TEXT_ARCHITECTURES`` that TurboMind runs.
TURBOMIND_TEXT: Final = frozenset(
    {
        "LlamaForCausalLM", "InternLM2ForCausalLM", "InternLM3ForCausalLM", "Qwen2ForCausalLM",
        "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GptOssForCausalLM",
    }
)  # fmt: skip

#: Language models that TurboMind runs only inside a vision model.
TURBOMIND_INNER: Final = frozenset({"Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"})

#: The sliding window of all layers, in tokens, if the key ``sliding_window`` is absent.
#: Source: transformers 5.17.0 configuration_mistral.py::MistralConfig `sliding_window: int | None`
_WINDOW_BY_LENGTH: Final = {"MistralForCausalLM": 4096, "MixtralForCausalLM": 0}
#: Whether some layer has a sliding window if ``use_sliding_window`` is true. Each function takes
#: ``max_window_layers`` and the number of layers. In most families, layers from
#: ``max_window_layers`` on have a window; in Qwen2-MoE, every other layer below that number has a
#: window; in Qwen3-MoE, every layer has one.
#: Source: configuration_qwen*.py of Transformers 5.17.
_WINDOW_BY_SWITCH: Final[dict[str, Callable[[int, int], bool]]] = {
    "Qwen2MoeForCausalLM": lambda first, _: first > 0,
    "Qwen3MoeForCausalLM": lambda *_: True,
    **dict.fromkeys(
        (
            "Qwen2ForCausalLM",
            "Qwen2VLTextModel",
            "Qwen2_5OmniTextModel",
            "Qwen3ForCausalLM",
        ),
        lambda first, layers: first < layers,
    ),
}

#: LMDeploy's default ``session_len`` is the smallest value of ``max_position_embeddings`` and of
#: these keys.
_OTHER_LENGTH_KEYS: Final = (
    "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length",
    "max_seq_length", "seq_len",
)  # fmt: skip
_LARGEST_LENGTH: Final = 1 << 30
#: Models whose router has no correction bias if ``topk_method`` is missing.
_GREEDY: Final = frozenset({"DeepseekForCausalLM", "DeepseekV2ForCausalLM"})
_LINEAR: Final = "linear_attention"
_FULL: Final = "full_attention"
#: The step from one layer with attention to the next, if the config has no ``layer_types``.
#: Source: transformers 5.17.0 qwen3_next/configuration_qwen3_next.py::Qwen3NextConfig #6732bf
_INTERVAL: Final = 4


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = load_yaml(preset_path("families", "text"))["models"]
    return models


def read_text(config: Section, architecture: str, *, tied: bool | None = None) -> TextDims:
    """Read the dimensions of a language model.

    Args:
        config: config.json, or the part of it that describes the language model.
        architecture: a key of ``presets/families/text.yaml``.
        tied: whether head and embeddings are one tensor, if ``config`` does not say.
    """
    defaults = _defaults()[architecture]
    hidden = config.integer("hidden_size", defaults["hidden_size"], high=1 << 18)
    heads, kv_heads, head_dim = _heads(config, defaults, hidden)
    layers = config.integer("num_hidden_layers", defaults["num_hidden_layers"], high=1 << 10)
    biases = _BIASES.get(architecture, (_ATTENTION_BIAS, _ATTENTION_BIAS, False))
    qkv_bias, output_bias, mlp_bias = [
        bias if isinstance(bias, bool) else config.boolean(*bias) for bias in biases
    ]
    has_latent, expanded = "latent" in defaults, "expanded" in defaults
    mla = None
    if expanded or has_latent:
        mla = _latents(config, hidden, heads, expanded=expanded)
        head_dim = mla.key_dim
    inner = config.integer("intermediate_size", defaults["intermediate_size"], high=1 << 20)
    vocab = config.integer("vocab_size", defaults["vocab_size"])
    length = _length(config, defaults["max_position_embeddings"])
    usually_tied = defaults.get("tied", False) if tied is None else tied
    tied = config.boolean("tie_word_embeddings", usually_tied)
    is_hybrid, is_phi_moe = "hybrid" in defaults, architecture == _PHI_MOE
    may_norm, always_norms = architecture == _GLM_MOE, architecture.startswith(("Qwen3", "Gemma3"))
    norms_heads = always_norms or (may_norm and config.boolean("use_qk_norm", False))
    read_experts = _routed_experts if mla or "routed" in defaults else _moe
    experts = read_experts(config, architecture, defaults, layers)
    window = _window(config, architecture, layers)
    return TextDims(
        architecture=defaults.get("run_as", architecture),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=1 if has_latent else kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        vocab=vocab,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
        delta=_delta(config, layers) if is_hybrid else None,
        output_gate=is_hybrid,
        mla=mla,
        sinks=architecture == _GPT_OSS,
        qk_norm=norms_heads,
        layer_norms=defaults.get("norms", 2),
        moe=experts,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        norm_bias=is_phi_moe,
        head_bias=is_phi_moe and config.boolean("lm_head_bias", False),
        sliding_window=window or UNSET,
        draft_layers=_draft_layers(config, architecture),
    )


def _draft_layers(config: Section, architecture: str) -> int | UnsetType:
    """Return how many layers propose tokens; UNSET for one, as every published model has."""
    key = _DRAFT_LAYERS.get(architecture)
    layers = config.integer(key, 1, low=0, high=1 << 10) if key else 1
    return UNSET if layers == 1 else layers


def _heads(config: Section, defaults: dict[str, Any], hidden: int) -> tuple[int, int, int]:
    """Return the numbers of query heads, of KV heads, and of channels in a head.

    Numbers that do not divide evenly are refused.
    """
    heads = config.integer("num_attention_heads", defaults["num_attention_heads"], high=1 << 12)
    kv_default = defaults["num_key_value_heads"] or heads
    kv_heads = config.divisor("num_key_value_heads", heads, "heads", kv_default)
    # Without a given or default number of channels in a head, the heads divide the hidden channels.
    divided = not {"head_dim", "latent"} & defaults.keys()
    config.refuse_if(
        "head_dim" not in config and divided and hidden % heads,
        "num_attention_heads",
        f"{heads} does not divide {hidden} channels",
    )
    usual = defaults.get("head_dim") or max(1, hidden // heads)
    return heads, kv_heads, config.integer("head_dim", usual, high=1 << 10)


def _moe(
    config: Section, architecture: str, defaults: dict[str, Any], layers: int
) -> MoeDims | None:
    """Read the experts of Mixtral, Phi, GPT-OSS and Qwen; None for a dense model."""
    if "num_experts" not in defaults:
        return None
    all_sparse = architecture in {"MixtralForCausalLM", _PHI_MOE, _GPT_OSS}
    # Transformers 5 also writes num_local_experts for Qwen3-MoE.
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    per_token = config.integer("num_experts_per_tok", defaults["num_experts_per_tok"], high=1 << 10)
    experts = config.integer(key, defaults["num_experts"], low=per_token, high=1 << 13)
    inter_key = "intermediate_size" if all_sparse else "moe_intermediate_size"
    step = 1 if all_sparse else config.integer("decoder_sparse_step", 1, high=1 << 10)
    return MoeDims(
        experts=experts,
        experts_per_token=per_token,
        intermediate=config.integer(inter_key, defaults[inter_key], high=1 << 20),
        layers=layers if all_sparse else _sparse_layers(config, layers, step),
        step=step,
        shared_intermediate=config.integer(
            "shared_expert_intermediate_size", defaults["shared_expert_intermediate_size"]
        )
        if "shared_expert_intermediate_size" in defaults
        else 0,
        router_bias=architecture == _GPT_OSS,
    )


def _sparse_layers(config: Section, layers: int, step: int) -> int:
    """Count layers with experts: every ``step``-th layer that is not in ``mlp_only_layers``."""
    dense = set(config.integers("mlp_only_layers"))
    sparse = sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    config.refuse_if(not sparse, "mlp_only_layers", "leaves no layer with experts")
    return sparse


def _window(config: Section, architecture: str, layers: int) -> int:
    """Return the length of the sliding window in tokens; 0 if no layer has one in Transformers.

    A Mistral without the key ``sliding_window`` has the default window; the value null means no
    window.
    """
    if architecture in _WINDOW_BY_LENGTH:
        if "sliding_window" in config.values and "sliding_window" not in config:
            return 0
        default = _WINDOW_BY_LENGTH[architecture]
        return config.integer("sliding_window", default, low=0, high=_LARGEST_LENGTH)
    if architecture not in _WINDOW_BY_SWITCH or not config.boolean("use_sliding_window", False):
        return 0
    window = config.integer("sliding_window", 4096, low=0, high=_LARGEST_LENGTH)
    if "layer_types" in config:
        return window if "sliding_attention" in config.strings("layer_types") else 0
    first = config.integer("max_window_layers", 28, low=0, high=1 << 10)
    return window if _WINDOW_BY_SWITCH[architecture](first, layers) else 0


def _length(config: Section, default: int) -> int:
    """Return the context, in tokens, that LMDeploy chooses by default."""
    length = config.integer("max_position_embeddings", default, high=_LARGEST_LENGTH)
    for key in _OTHER_LENGTH_KEYS:
        value = config.values.get(key)
        if type(value) is int and 0 < value < length:
            length = value
    return length


def _latents(config: Section, hidden: int, heads: int, *, expanded: bool) -> MlaDims:
    """Read the dims of latent attention.

    ``expanded``: LMDeploy caches keys and values made from the latents, as for MiniCPM3. Only then
    does a missing key of the config have a default. Source:
    lmdeploy pytorch/models/minicpm3.py::MiniCPMAttention.__init__ #f7a181
    """
    values, default_dims = hidden // heads, (256, 64, 32) if expanded else (None, None, None)
    for key, only in (("v_head_dim", values), ("num_key_value_heads", heads)):
        config.refuse_if(
            expanded and config.integer(key, only) != only,
            key,
            f"is not {only}, as LMDeploy takes it",
        )
    config.refuse_if(
        expanded and "q_lora_rank" in config.values and "q_lora_rank" not in config,
        "q_lora_rank",
        "is null, which LMDeploy does not run",
    )
    ranked = expanded or "q_lora_rank" in config
    return MlaDims(
        kv_rank=config.integer("kv_lora_rank", default_dims[0], high=1 << 16),
        nope_dim=config.integer("qk_nope_head_dim", default_dims[1], high=1 << 12),
        rope_dim=config.integer("qk_rope_head_dim", default_dims[2], high=1 << 12),
        v_dim=values if expanded else config.integer("v_head_dim", high=1 << 12),
        q_rank=config.integer("q_lora_rank", 768, high=1 << 16) if ranked else 0,
        expanded=expanded,
    )


def _routed_experts(
    config: Section, architecture: str, defaults: Mapping[str, int], layers: int
) -> MoeDims | None:
    """Read the experts from DeepSeek's keys; None if no layer has experts.

    The first layers may be dense; all later layers have experts. Shared experts form one MLP with
    the sum of their widths. ``topk_method`` decides whether the router has a correction bias;
    without this key, the classes of V3 and GLM have a bias.
    """

    def number(key: str, default: int | None, low: int = 1, high: int = 1 << 10) -> int:
        return config.integer(key, defaults.get(key, default), low=low, high=high)

    if "n_routed_experts" not in config and "n_routed_experts" not in defaults:
        return None
    dense = number("first_k_dense_replace", 0, low=0)
    kinds = config.strings("mlp_layer_types")
    if kinds:
        dense = len(kinds) - kinds.count("sparse")
    config.refuse_if(
        number("moe_layer_freq", 1) != 1 or "sparse" in kinds[:dense],
        "moe_layer_freq",
        "has dense layers behind the first experts: turbofit has no account of that",
    )
    if dense >= layers:
        return None
    per_token = number("num_experts_per_tok", None)
    intermediate = number("moe_intermediate_size", None, high=1 << 20)
    topk = config.string("topk_method", "greedy" if architecture in _GREEDY else "noaux_tc")
    return MoeDims(
        experts=number("n_routed_experts", None, low=per_token, high=1 << 13),
        experts_per_token=per_token,
        intermediate=intermediate,
        layers=layers - dense,
        shared_intermediate=intermediate * number("n_shared_experts", 0),
        shared_gate=False,
        correction=topk == "noaux_tc",
    )


def _delta(config: Section, layers: int) -> DeltaDims | None:
    """Read the gated delta nets of a Qwen3.5; None if every layer has attention."""
    values = config.integer("linear_num_value_heads", 32, high=1 << 12)
    keys = config.divisor("linear_num_key_heads", values, "value heads", 16)
    linear = _linear_layers(config, layers)
    if not linear:
        return None
    return DeltaDims(
        layers=linear,
        key_heads=keys,
        value_heads=values,
        key_dim=config.integer("linear_key_head_dim", 128, high=1 << 10),
        value_dim=config.integer("linear_value_head_dim", 128, high=1 << 10),
        kernel=config.integer("linear_conv_kernel_dim", 4, high=64),
    )


def _linear_layers(config: Section, layers: int) -> int:
    """Return the number of layers with a gated delta net in place of attention."""
    if "layer_types" not in config:
        interval = config.integer("full_attention_interval", _INTERVAL, high=1 << 10)
        return layers - layers // interval
    kinds = config.strings("layer_types")
    config.refuse_if(len(kinds) != layers, "layer_types", f"names {len(kinds)} layers of {layers}")
    if other := set(kinds) - {_LINEAR, _FULL}:
        raise config.error("layer_types", f"has an unknown kind: {min(other)[:40]!r}")
    linear = kinds.count(_LINEAR)
    config.refuse_if(linear == layers, "layer_types", "leaves no layer with attention")
    return linear
