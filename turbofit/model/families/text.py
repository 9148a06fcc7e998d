"""Language models: dimensions from config.json, with the defaults of each config class.

Keys that a config leaves out take Transformers' defaults (or, for InternLM, those of the published
remote code), since engines read the file through those classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from msgspec import UNSET

from turbofit.core.model import MoeDims, TextDims
from turbofit.model.config import Section
from turbofit.model.families.delta import read_delta
from turbofit.model.families.mla import (
    read_expanded,
    read_latent_experts,
    read_mla,
    routed_experts,
)

__all__ = ["TEXT_ARCHITECTURES", "TURBOMIND_INNER", "TURBOMIND_TEXT", "read_text"]

#: Defaults by architecture. ``kv_heads`` None means as many as heads; no ``head_dim`` means
#: hidden / heads; ``norms`` of a layer are two where it does not say.
_LLAMA: Final[dict[str, Any]] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048,
}  # fmt: skip
_QWEN2: Final[dict[str, Any]] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
_GEMMA2: Final[dict[str, Any]] = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tied": True, "norms": 4,
}  # fmt: skip
#: Multi-head latent attention: engines attend to one KV head, whatever the config says.
_LATENT: Final[dict[str, Any]] = {**_LLAMA, "vocab_size": 102400, "latent": True}
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "LlamaForCausalLM": _LLAMA,
    "InternLM2ForCausalLM": {**_LLAMA, "vocab_size": 103168},
    "InternLM3ForCausalLM": {**_LLAMA, "vocab_size": 128512, "max_position_embeddings": 32768},
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": {**_QWEN2, "head_dim": 128},
    "Qwen2MoeForCausalLM": {
        **_QWEN2, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "Qwen3MoeForCausalLM": {
        **_QWEN2, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "MixtralForCausalLM": {
        **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "num_experts": 8, "num_experts_per_tok": 2,
    },
    "MistralForCausalLM": {
        **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "PhiMoEForCausalLM": {
        **_LLAMA, "vocab_size": 32064, "intermediate_size": 6400, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "num_experts": 16, "num_experts_per_tok": 2,
    },
    "Phi3ForCausalLM": {
        **_LLAMA, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 4096,
    },
    "GemmaForCausalLM": {
        **_LLAMA, "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "head_dim": 256, "max_position_embeddings": 8192, "tied": True,
    },
    "Gemma2ForCausalLM": {
        **_GEMMA2, "vocab_size": 256000, "max_position_embeddings": 8192,
    },
    "Gemma3ForCausalLM": {
        **_GEMMA2, "vocab_size": 262208, "max_position_embeddings": 131072,
    },
    "Glm4ForCausalLM": {
        **_LLAMA, "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "norms": 4,
    },
    "Glm4MoeForCausalLM": {
        **_LLAMA, "vocab_size": 151552, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
        "first_dense": 1, "shared_experts": 1, "head_dim": None,  # hidden / heads, whole or not
    },
    # Experts have biases, its only MLP; the router too.
    "GptOssForCausalLM": {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072, "num_experts": 128,
        "num_experts_per_tok": 4,
    },
    "Qwen3NextForCausalLM": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "max_position_embeddings": 32768, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "hybrid": True,
    },
    # Experts as DeepSeek-V2's, behind ordinary attention.
    "DeepseekForCausalLM": {**_LLAMA, "vocab_size": 102400, "routed": True},
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": {
        **_LATENT, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "num_hidden_layers": 61, "num_attention_heads": 128, "max_position_embeddings": 4096,
    },
    "Glm4MoeLiteForCausalLM": {
        **_LATENT, "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
        "num_hidden_layers": 47, "num_attention_heads": 20, "max_position_embeddings": 202752,
    },
    "MiniCPM3ForCausalLM": {
        "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400,
        "num_hidden_layers": 62, "num_attention_heads": 40, "num_key_value_heads": None,
        "max_position_embeddings": 32768, "tied": True, "expanded": True,
    },
}  # fmt: skip
_QWEN3_5: Final[dict[str, Any]] = {
    "vocab_size": 248320, "num_attention_heads": 16, "head_dim": 256,
    "max_position_embeddings": 32768, "hybrid": True,
}  # fmt: skip
#: Language models that exist only inside a vision model.
_INNER: Final[dict[str, dict[str, Any]]] = {
    # Of Qwen2-VL and Qwen2.5-VL; engines run it as their Qwen2.
    "Qwen2VLTextModel": {
        **_QWEN2, "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "Qwen2_5OmniTextModel": {
        **_QWEN2, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "Qwen3VLTextModel": {**_QWEN2, "head_dim": 128, "max_position_embeddings": 128000},
    "Qwen3VLMoeTextModel": {
        **_QWEN2, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "max_position_embeddings": 128000,
    },
    "Qwen3OmniMoeTextModel": {
        **_QWEN2, "vocab_size": 3584, "hidden_size": 2048, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "Glm4vTextModel": {
        **_LLAMA, "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_key_value_heads": 2, "max_position_embeddings": 32768, "norms": 4,
    },
    "Qwen3_5TextModel": {**_QWEN3_5, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 32, "num_key_value_heads": 4},
    # There is no dense MLP; the shared expert's width stands in its place.
    "Qwen3_5MoeTextModel": {
        **_QWEN3_5, "hidden_size": 2048, "intermediate_size": 512, "num_hidden_layers": 40,
        "num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    },
    "Llama4TextModel": {
        **_LLAMA, "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 131072,
    },
    "KimiK2ForCausalLM": _DEFAULTS["DeepseekV3ForCausalLM"],
    "CogVLMForCausalLM": _LLAMA,
    "MllamaForCausalLM": {
        **_LLAMA, "vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "max_position_embeddings": 131072,
    },
}  # fmt: skip

#: Language models that the account covers, by ``architectures[0]``.
TEXT_ARCHITECTURES: Final = frozenset(_DEFAULTS)

#: The plain language model that engines run an inner one as.
_RUN_AS: Final = {
    "Qwen2VLTextModel": "Qwen2ForCausalLM",
    "Qwen2_5OmniTextModel": "Qwen2ForCausalLM",
    "Qwen3VLTextModel": "Qwen3ForCausalLM",
    "Qwen3VLMoeTextModel": "Qwen3MoeForCausalLM",
    "Qwen3OmniMoeTextModel": "Qwen3MoeForCausalLM",
    "Llama4TextModel": "Llama4ForCausalLM",
    "Qwen3_5TextModel": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeTextModel": "Qwen3_5MoeForCausalLM",
    "Glm4vTextModel": "Glm4ForCausalLM",
}

_GPT_OSS: Final = "GptOssForCausalLM"
_GLM_MOE: Final = "Glm4MoeForCausalLM"
_PHI_MOE: Final = "PhiMoEForCausalLM"
_BIASED_KEYS: Final = {
    "Qwen2ForCausalLM", "Qwen2VLTextModel", "Qwen2_5OmniTextModel", "Glm4vTextModel",
}  # fmt: skip
_UNBIASED: Final = {
    "MixtralForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "CogVLMForCausalLM",
    "MllamaForCausalLM",
}  # fmt: skip

#: Of ``TEXT_ARCHITECTURES``, what TurboMind 0.18 runs.
TURBOMIND_TEXT: Final = frozenset(
    {
        "LlamaForCausalLM", "InternLM2ForCausalLM", "InternLM3ForCausalLM", "Qwen2ForCausalLM",
        "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GptOssForCausalLM",
    }
)  # fmt: skip

#: Language models that TurboMind 0.18 runs inside of a vision model only.
TURBOMIND_INNER: Final = frozenset({"Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"})

#: ``sliding_window`` of all layers where the key is absent: configuration_mistral.py and
#: configuration_mixtral.py of Transformers 5.17.
_WINDOW_BY_LENGTH: Final = {"MistralForCausalLM": 4096, "MixtralForCausalLM": 0}
#: Whether a layer has a window where ``use_sliding_window`` is set: ``max_window_layers`` and the
#: layers there are. Layers behind that number have one; of Qwen2-MoE every other layer before it;
#: of Qwen3-MoE all layers. configuration_qwen*.py of Transformers 5.17.
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

#: LMDeploy's default ``session_len`` is the smallest of ``max_position_embeddings`` and these.
_OTHER_LENGTH_KEYS: Final = (
    "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length",
    "max_seq_length", "seq_len",
)  # fmt: skip
_LARGEST_LENGTH: Final = 1 << 30


def read_text(config: Section, architecture: str, *, tied: bool | None = None) -> TextDims:
    """Dimensions of the language model.

    Args:
        config: config.json, or the part of it that describes the language model.
        architecture: a key of this module's defaults.
        tied: whether head and embeddings are one tensor, where ``config`` does not say.

    Raises:
        UsageError: a dimension is missing, absurd or contradicts another.
    """
    defaults = _DEFAULTS.get(architecture) or _INNER[architecture]
    hidden = config.integer("hidden_size", defaults["hidden_size"], high=1 << 18)
    heads = _heads(config, defaults, hidden)
    layers = config.integer("num_hidden_layers", defaults["num_hidden_layers"], high=1 << 10)
    biases = _biases(config, architecture)
    mla = read_mla(config) if "latent" in defaults else None
    if "expanded" in defaults:
        mla = read_expanded(config, hidden, heads.query)
    return TextDims(
        architecture=_RUN_AS.get(architecture, architecture),
        layers=layers,
        hidden=hidden,
        heads=heads.query,
        kv_heads=1 if "latent" in defaults else heads.key_value,
        head_dim=mla.key_dim if mla else heads.channels,
        intermediate=config.integer(
            "intermediate_size", defaults["intermediate_size"], high=1 << 20
        ),
        vocab=config.integer("vocab_size", defaults["vocab_size"]),
        max_position_embeddings=_length(config, defaults["max_position_embeddings"]),
        tie_word_embeddings=config.boolean(
            "tie_word_embeddings", defaults.get("tied", False) if tied is None else tied
        ),
        delta=read_delta(config, layers) if "hybrid" in defaults else None,
        output_gate="hybrid" in defaults,
        mla=mla,
        sinks=architecture == _GPT_OSS,
        qk_norm=architecture.startswith(("Qwen3", "Gemma3"))
        or (architecture == _GLM_MOE and config.boolean("use_qk_norm", False)),
        layer_norms=defaults.get("norms", 2),
        moe=read_latent_experts(config, architecture, layers)
        if mla or "routed" in defaults
        else _moe(config, architecture, defaults, layers),
        qkv_bias=biases.qkv,
        output_bias=biases.output,
        mlp_bias=biases.mlp,
        norm_bias=architecture == _PHI_MOE,
        head_bias=architecture == _PHI_MOE and config.boolean("lm_head_bias", False),
        sliding_window=_window(config, architecture, layers) or UNSET,
    )


class _Heads(NamedTuple):
    """Attention heads of queries, and of keys and values; the channels of one."""

    query: int
    key_value: int
    channels: int


def _heads(config: Section, defaults: dict[str, Any], hidden: int) -> _Heads:
    """The heads of a layer, which must divide each other and the channels."""
    heads = config.integer("num_attention_heads", defaults["num_attention_heads"], high=1 << 12)
    kv_default = defaults["num_key_value_heads"] or heads
    kv_heads = config.integer("num_key_value_heads", kv_default, high=1 << 12)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    divided = not {"head_dim", "latent"} & defaults.keys()
    if "head_dim" not in config and divided and hidden % heads:
        raise config.error("num_attention_heads", f"{heads} does not divide {hidden} channels")
    usual = defaults.get("head_dim") or max(1, hidden // heads)
    return _Heads(heads, kv_heads, config.integer("head_dim", usual, high=1 << 10))


class _Biases(NamedTuple):
    """Which linear layers have biases."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


def _biases(config: Section, architecture: str) -> _Biases:
    """Read which layers have biases: each family has its own key."""
    if architecture == "InternLM2ForCausalLM":
        bias = config.boolean("bias", True)
        return _Biases(bias, bias)
    if architecture == "InternLM3ForCausalLM":
        bias = config.boolean("bias", False)
        return _Biases(config.boolean("qkv_bias", False), bias, bias)
    if architecture == "Qwen2MoeForCausalLM":
        return _Biases(config.boolean("qkv_bias", True))
    if architecture in _BIASED_KEYS:
        return _Biases(True)
    if architecture in _UNBIASED:
        return _Biases()
    if architecture == _GPT_OSS:
        bias = config.boolean("attention_bias", True)
        return _Biases(bias, bias, True)
    bias = config.boolean("attention_bias", False)
    mlp = architecture == "LlamaForCausalLM" and config.boolean("mlp_bias", False)
    return _Biases(bias, bias and architecture not in {"Glm4ForCausalLM", _GLM_MOE}, mlp)


def _moe(
    config: Section, architecture: str, defaults: dict[str, Any], layers: int
) -> MoeDims | None:
    """The experts; None for dense models."""
    if "num_experts" not in defaults:
        return None
    if "first_dense" in defaults:
        return _moe_behind_dense(config, defaults, layers)
    every = architecture in {"MixtralForCausalLM", _PHI_MOE, _GPT_OSS}
    # Transformers 5 writes num_local_experts for Qwen3-MoE too.
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    per_token = config.integer("num_experts_per_tok", defaults["num_experts_per_tok"], high=1 << 10)
    experts = config.integer(key, defaults["num_experts"], low=per_token, high=1 << 13)
    inter_key = "intermediate_size" if every else "moe_intermediate_size"
    step = 1 if every else config.integer("decoder_sparse_step", 1, high=1 << 10)
    return MoeDims(
        experts=experts,
        experts_per_token=per_token,
        intermediate=config.integer(inter_key, defaults[inter_key], high=1 << 20),
        layers=layers if every else _sparse_layers(config, layers, step),
        step=step,
        shared_intermediate=config.integer(
            "shared_expert_intermediate_size", defaults["shared_expert_intermediate_size"]
        )
        if "shared_expert_intermediate_size" in defaults
        else 0,
        router_bias=architecture == _GPT_OSS,
    )


def _moe_behind_dense(config: Section, defaults: dict[str, Any], layers: int) -> MoeDims:
    """Experts of all layers but the first."""
    dense = config.integer("first_k_dense_replace", defaults["first_dense"], low=0, high=1 << 10)
    if dense >= layers:
        raise config.error("first_k_dense_replace", "leaves no layer with experts")
    return routed_experts(config, layers - dense, correction=True, defaults=defaults)


def _sparse_layers(config: Section, layers: int, step: int) -> int:
    """How many layers have experts: every ``step``-th, but for those of ``mlp_only_layers``."""
    dense = set(config.integers("mlp_only_layers"))
    sparse = sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    if not sparse:
        raise config.error("mlp_only_layers", "leaves no layer with experts")
    return sparse


def _window(config: Section, architecture: str, layers: int) -> int:
    """Tokens of the sliding window that Transformers' class gives some layer; 0 without one.

    Mistral has one where the key is absent, and none where it is null.
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
    """The context that LMDeploy takes by default."""
    length = config.integer("max_position_embeddings", default, high=_LARGEST_LENGTH)
    for key in _OTHER_LENGTH_KEYS:
        value = config.values.get(key)
        if type(value) is int and 0 < value < length:
            length = value
    return length
