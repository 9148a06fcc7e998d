"""Which engine runs which model: LMDeploy 0.18's two and Hugging Face Transformers.

Facts are LMDeploy's own tables and loaders (`turbomind/supported_models.py` and `models/`,
`pytorch/models/module_map.py`, `pytorch/nn/linear`, `vl/model/`). LMDeploy's choice of an engine
looks at the outer architecture alone: where that is known to TurboMind and the rest is not, it
fails at load instead of falling back.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.model import Model, Quantization, TextDims
from turbofit.model.families.text import TEXT_ARCHITECTURES, TURBOMIND_INNER, TURBOMIND_TEXT

__all__ = ["PROJECTOR_AS_TEXT", "TURBOMIND_VISION", "engine_problem"]

_INTERN_S2: Final = "InternS2PreviewForConditionalGeneration"
#: Vision models for which TurboMind has an encoder of its own.
TURBOMIND_VISION: Final = frozenset(
    {
        "InternS1ForConditionalGeneration",
        _INTERN_S2,
        "InternVLChatModel",
        "InternVLForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    }
)

#: Vision models that have an account and no class in LMDeploy's PyTorch engine.
_NOT_PYTORCH: Final = frozenset(
    {
        "Idefics3ForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "MllamaForConditionalGeneration",
        "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniModel",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    }
)

#: Models that only the checkpoint's own code defines: `transformers serve` loads none of these.
_REMOTE_CODE: Final = frozenset(
    {
        "InternS1ForConditionalGeneration",
        _INTERN_S2,
        "InternS1ProForConditionalGeneration",
        "InternS1_1_ForConditionalGeneration",
        "InternVLChatModel",
        "InternLM2ForCausalLM",
        "InternLM3ForCausalLM",
        "CogVLMForCausalLM",
        "ChatGLMModel",
        "ChatGLMForConditionalGeneration",
        "DeepseekForCausalLM",
        "Phi3VForCausalLM",
    }
)

#: Models of whose account in Transformers nothing is known.
_QWEN3_OMNI: Final = "Qwen3OmniMoeForConditionalGeneration"
_LMDEPLOY_ALONE: Final = frozenset(
    {
        "GptOssForCausalLM",
        "Glm4MoeForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen3NextForCausalLM",
        _QWEN3_OMNI,
    }
)

#: Whose classes in LMDeploy's PyTorch engine build attention or experts in 16 bits, whatever the
#: config says of others. Source: models/deepseek.py, minicpm3.py, phi3_moe.py.
_SIXTEEN_BITS: Final = frozenset(
    {"DeepseekForCausalLM", "MiniCPM3ForCausalLM", "PhiMoEForCausalLM"}
)

#: Whose projectors LMDeploy's PyTorch engine builds as layers of the language model: sharded, and
#: quantised where these are, though checkpoints leave them at 16 bits.
#: Source: models/internvl3_hf.py.
PROJECTOR_AS_TEXT: Final = frozenset(
    {"InternVLForConditionalGeneration", "InternS1ForConditionalGeneration"}
)

_KIMI: Final = "KimiK25ForConditionalGeneration"
_KIMI_GROUP: Final = 32

#: Group sizes that TurboMind's 4-bit kernels take, and channels of a head of its Qwen encoders.
_TURBOMIND_GROUPS: Final = {"awq": {128}, "gptq": {128}, "compressed-tensors": {32, 128}}
_TURBOMIND_HEADS: Final = {"qwen2vit": {64, 80}, "qwen2_5vit": {64, 80}, "qwen3vit": {64, 72}}


def engine_problem(model: Model, engine: str) -> str | None:
    """Why an engine does not run a model, None where it does.

    Args:
        model: the checkpoint.
        engine: ``turbomind``, ``pytorch`` (both LMDeploy's) or ``transformers``.

    Raises:
        ValueError: another engine.
    """
    checks = {"turbomind": _turbomind, "pytorch": _pytorch, "transformers": _transformers}
    if engine not in checks:
        raise ValueError(engine)
    return checks[engine](model)


def _turbomind(model: Model) -> str | None:
    text, vision, quantization = model.text, model.vision, model.quantization
    if model.architecture not in TEXT_ARCHITECTURES | TURBOMIND_VISION:
        if vision is None:
            return f"TurboMind 0.18 does not run {model.architecture}"
        return f"TurboMind 0.18 has no encoder for {model.name}'s vision tower"
    if text.architecture not in TURBOMIND_TEXT | TURBOMIND_INNER:
        inside = " inside; LMDeploy would not fall back" if vision else ""
        return f"TurboMind 0.18 does not run {text.architecture}{inside}"
    if text.mla and quantization:
        # builders/mla.py multiplies its weights as they are stored.
        return "turbofit has no account of TurboMind's latent attention in quantised checkpoints"
    if text.moe and (
        text.moe.step != 1
        or (text.architecture == "Qwen2MoeForCausalLM" and text.moe.layers < text.layers)
    ):
        return "TurboMind 0.18 takes every layer as sparse, this model has dense ones"
    heads = _TURBOMIND_HEADS.get(vision.kind) if vision else None
    if vision and heads and vision.head_dim not in heads:
        known = " or ".join(map(str, sorted(heads)))
        return f"TurboMind 0.18 runs vision heads of {known} channels, not {vision.head_dim}"
    if text.delta and (text.delta.key_dim, text.delta.value_dim) != (128, 128):
        return "TurboMind 0.18 runs gated delta nets with heads of 128 channels only"
    if quantization and quantization.method == "gptq" and _packs_delta(text, quantization):
        # builders/deltanet.py joins projections that are packed and that are not; gptq cannot.
        return "TurboMind 0.18 cannot widen gptq weights, as gated delta nets need it: take awq"
    if quantization and quantization.method == "fp8" and _splits_scales(text, quantization):
        return f"TurboMind 0.18 cannot turn fp8 scales of these heads of {text.head_dim} channels"
    if quantization and quantization.group_size not in _TURBOMIND_GROUPS.get(
        quantization.method, {quantization.group_size}
    ):
        return f"TurboMind 0.18 does not run {quantization.method} groups of " + str(
            quantization.group_size
        )
    return _cut_group(text, quantization) if quantization else None


def _cut_group(text: TextDims, packed: Quantization) -> str | None:
    """A layer whose inputs are no whole groups: it fails at load, or at its first forward.

    Source: the kernels' shape constraints and builders/ffn.py, seen on pretend GPUs of sm_89 and
    sm_90 in AWQ and fp8.
    """
    moe, size = text.moe, packed.group_size
    if packed.of_experts:
        return None
    inputs = {"hidden size's": (text.hidden, "mlp.up_proj")}
    inputs["heads'"] = (text.heads * text.head_dim, "self_attn.o_proj")
    if moe is None or moe.layers < text.layers:
        inputs["MLP's"] = (text.intermediate, "mlp.down_proj")
    if moe is not None:
        inputs["experts'"] = (moe.intermediate, "mlp.experts.0.down_proj")
        inputs["shared expert's"] = (moe.shared_intermediate, "mlp.shared_expert.down_proj")
    for whose, (channels, module) in inputs.items():
        if channels % size and not all(
            packed.exempts(module, layer) for layer in range(text.layers)
        ):
            return (
                f"TurboMind 0.18 takes whole groups of {size}: not the {whose} {channels} channels"
            )
    return None


def _packs_delta(text: TextDims, packed: Quantization) -> bool:
    """Whether some input projection of a gated delta net is packed."""
    return text.delta is not None and not all(
        packed.exempts(f"linear_attn.{name}", layer)
        for name in ("in_proj_qkv", "in_proj_z")
        for layer in range(text.layers)
    )


def _splits_scales(text: TextDims, packed: Quantization) -> bool:
    """Whether queries' or keys' rows of scales, each of several heads, are no whole sets of these.

    Source: turbomind/models/utils.py, reorder_rotary_emb; its view of them fails at load.
    """
    if packed.group_size % text.head_dim:
        return False
    each = packed.group_size // text.head_dim
    return any(-(-heads // each) % each for heads in (text.heads, text.kv_heads))


def _pytorch(model: Model) -> str | None:
    vision, quantization = model.vision, model.quantization
    if model.architecture in _NOT_PYTORCH:
        return f"LMDeploy 0.18 runs {model.architecture} on no engine"
    if model.architecture == "LlavaNextForConditionalGeneration":
        # vl/model/llava_next.py passes trust_remote_code to a class of Transformers without it.
        return "LMDeploy 0.18's own front end for LLaVA-NeXT fails at its start"
    if model.architecture == _INTERN_S2:
        # models/qwen3_5_moe.py builds it where config.json has a ts_config, and loads nothing.
        return (
            "turbofit has no account of the time series encoder that LMDeploy's PyTorch engine"
            " builds for Intern-S2"
        )
    if vision and vision.kind == "siglip":
        return f"LMDeploy 0.18 runs {model.architecture} with a CLIP tower only, not SigLIP"
    if quantization is None:
        return None
    if model.architecture == "Llama4ForConditionalGeneration":
        # models/llama4.py takes every quantisation for an fp8 of its own.
        return f"turbofit has no account of Llama 4 in {quantization.method}: take 16 bits"
    if model.architecture in _SIXTEEN_BITS:
        return f"LMDeploy 0.18's PyTorch engine reads {model.architecture} in 16 bits only"
    if model.architecture == "Qwen3NextForCausalLM":
        # models/qwen3_next.py builds its delta nets without the config's quantisation.
        return "LMDeploy 0.18's PyTorch engine reads Qwen3-Next's delta nets in 16 bits only"
    if model.architecture == _QWEN3_OMNI:
        # configurations/qwen3_omni.py hands no quantisation on to its text model.
        return f"turbofit has no account of Qwen3-Omni in {quantization.method}: take 16 bits"
    if quantization.method == "awq" and model.text.delta is not None:
        # models/qwen3_5.py packs its delta nets without asking what the config exempts.
        return "turbofit has no account of AWQ with gated delta nets: take fp8 or 16 bits"
    if quantization.method == "awq" and model.architecture in PROJECTOR_AS_TEXT:
        return "LMDeploy 0.18's PyTorch engine looks for the projector in awq too"
    if quantization.method in {"gptq", "mxfp4"}:
        return f"LMDeploy 0.18's PyTorch engine does not read {quantization.method} weights"
    if model.architecture == _KIMI:
        return _kimi_problem(quantization)
    if quantization.method == "compressed-tensors" and model.text.mla is not None:
        # models/deepseek_v2.py does not tell its layers their names, by which some are exempt.
        return f"LMDeploy 0.18's {model.architecture} does not start with compressed-tensors"
    if quantization.method == "compressed-tensors":
        return "LMDeploy 0.18's PyTorch engine reads compressed-tensors for experts only"
    if quantization.method == "awq" and model.text.moe:
        return "LMDeploy 0.18's PyTorch engine has no experts in awq"
    return None


def _kimi_problem(quantization: Quantization) -> str | None:
    """What its class does not read. Source: pytorch/config.py, nn/moe/compressed_tensors.py."""
    if quantization.method != "compressed-tensors":
        return f"turbofit has no account of Kimi-K2.5 in {quantization.method}: take 4 bits or 16"
    if not quantization.of_experts:
        return "LMDeploy 0.18's PyTorch engine reads compressed-tensors for experts only"
    if quantization.group_size != _KIMI_GROUP:
        return (
            f"LMDeploy 0.18's PyTorch engine reads groups of {_KIMI_GROUP} in compressed-tensors,"
            f" not of {quantization.group_size}"
        )
    return None


def _transformers(model: Model) -> str | None:
    if model.text.mla is not None:
        # It caches every head's keys and values, where LMDeploy caches the latent.
        return "turbofit has no account of Transformers' multi-head latent attention"
    for name in (model.architecture, model.text.architecture):
        if name in _REMOTE_CODE:
            return f"Transformers has no {name}: only the checkpoint's own code defines it"
        if name in _LMDEPLOY_ALONE:
            return f"turbofit has no account of {name} in Transformers"
    if model.quantization is not None:
        return f"Transformers runs {model.quantization.method} weights only with further packages"
    return None
