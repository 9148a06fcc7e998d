"""Says which engines run a model: LMDeploy's two engines, and Hugging Face Transformers.

LMDeploy chooses an engine by the outer architecture only. If TurboMind knows this architecture but
cannot run another part of the model, loading fails: LMDeploy does not try its PyTorch engine.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.model import Model, Quantization, TextDims
from turbofit.core.version import REFERENCE
from turbofit.model.families.text import TEXT_ARCHITECTURES, TURBOMIND_INNER, TURBOMIND_TEXT

_TURBOMIND: Final = f"TurboMind {REFERENCE}"
_PYTORCH: Final = f"LMDeploy {REFERENCE}'s PyTorch engine"

_INTERN_S2: Final = "InternS2PreviewForConditionalGeneration"
#: Vision models for which TurboMind has its own encoder. Source:
#: lmdeploy turbomind/supported_models.py::SUPPORTED_ARCHS #003f8f
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

_QWEN3_OMNI: Final = "Qwen3OmniMoeForConditionalGeneration"
#: Why LMDeploy's PyTorch engine does not run a vision model that has an account.
_NOT_PYTORCH: Final = {
    **{
        name: f"LMDeploy {REFERENCE} runs {name} on no engine"
        for name in (
            "Idefics3ForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
            "MllamaForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration",
            "Qwen2_5OmniModel", "Qwen2_5OmniThinkerForConditionalGeneration",
            "SmolVLMForConditionalGeneration",
        )
    },
    # The engine passes trust_remote_code to a class of Transformers that does not accept it:
    # lmdeploy vl/model/llava_next.py::LlavaNextVisionModel.build_preprocessor #c9d7c9
    "LlavaNextForConditionalGeneration":
        f"LMDeploy {REFERENCE}'s own front end for LLaVA-NeXT fails at its start",
    # The engine builds the encoder if config.json has a ts_config, but loads no weights into it.
    _INTERN_S2:
        "turbofit has no account of the time series encoder that LMDeploy's PyTorch engine builds"
        " for Intern-S2",
}  # fmt: skip
#: Why the PyTorch engine runs a model only without quantisation.
_SIXTEEN_BITS: Final = {
    # lmdeploy models/llama4.py::Llama4ForConditionalGeneration._update_quant_config #25e372
    "Llama4ForConditionalGeneration":
        "turbofit has no account of Llama 4 in {method}: take 16 bits",
    # The engine's config builder passes None as quantization to the text model:
    # lmdeploy pytorch/configurations/qwen3_omni.py::Qwen3OmniModelConfigBuilder.build #36b510
    _QWEN3_OMNI: "turbofit has no account of Qwen3-Omni in {method}: take 16 bits",
    # lmdeploy pytorch/models/qwen3_next.py::Qwen3NextGatedDeltaNet.__init__ #50eb1f
    "Qwen3NextForCausalLM": f"{_PYTORCH} reads Qwen3-Next's delta nets in 16 bits only",
    # The classes of these models build attention or experts in 16 bits, whatever the config says.
    # Source: lmdeploy models/phi3_moe.py::PhiMoESparseMoeBlock.__init__ #c64855
    # lmdeploy models/deepseek.py::DeepseekMoE.__init__ #1cc57b
    **{
        name: f"{_PYTORCH} reads {name} in 16 bits only"
        for name in ("DeepseekForCausalLM", "MiniCPM3ForCausalLM", "PhiMoEForCausalLM")
    },
}  # fmt: skip

#: Models that only the checkpoint's own code defines; Transformers cannot load them.
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

#: Models without an account for Transformers.
_LMDEPLOY_ALONE: Final = frozenset(
    {
        "GptOssForCausalLM",
        "Glm4MoeForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen3NextForCausalLM",
        _QWEN3_OMNI,
    }
)

#: Vision models whose projector LMDeploy's PyTorch engine shards and quantises like the language
#: model's layers, though checkpoints store the projector in 16 bits. Source:
#: lmdeploy pytorch/models/internvl3_hf.py::InternVLMultiModalProjector.__init__ #302d9e
PROJECTOR_AS_TEXT: Final = frozenset(
    {"InternVLForConditionalGeneration", "InternS1ForConditionalGeneration"}
)

_KIMI: Final = "KimiK25ForConditionalGeneration"
_KIMI_GROUP: Final = 32

#: Group sizes of TurboMind's 4-bit kernels. Source:
#: lmdeploy turbomind/converter.py::_SUPPORTED_GROUP_SIZES #6f4cfa
_TURBOMIND_GROUPS: Final = {"awq": {128}, "gptq": {128}, "compressed-tensors": {32, 128}}
#: Channels that a head may have in TurboMind's Qwen encoders.
_TURBOMIND_HEADS: Final = {"qwen2vit": {64, 80}, "qwen2_5vit": {64, 80}, "qwen3vit": {64, 72}}


def engine_problem(model: Model, engine: str) -> str | None:
    """Return why an engine (``turbomind``, ``pytorch``, …) cannot run a model, or None."""
    checks = {"turbomind": _turbomind, "pytorch": _pytorch, "transformers": _transformers}
    return checks[engine](model)


def only_its_code(model: Model) -> bool:
    """Return whether only the checkpoint's own code defines the model, so Transformers lacks it."""
    return not _REMOTE_CODE.isdisjoint((model.architecture, model.text.architecture))


def _turbomind(model: Model) -> str | None:
    """Return why TurboMind cannot run the model's architecture, shape or quantisation, or None."""
    text, vision = model.text, model.vision
    if model.architecture not in TEXT_ARCHITECTURES | TURBOMIND_VISION:
        if vision:
            return f"{_TURBOMIND} has no encoder for {model.name}'s vision tower"
        return f"{_TURBOMIND} does not run {model.architecture}"
    if text.architecture not in TURBOMIND_TEXT | TURBOMIND_INNER:
        inside = " inside, and LMDeploy tries no other engine" if vision else ""
        return f"{_TURBOMIND} does not run {text.architecture}{inside}"
    if problem := _shape_on_turbomind(model):
        return problem
    return None if model.quantization is None else _packed_on_turbomind(text, model.quantization)


def _shape_on_turbomind(model: Model) -> str | None:
    """Return why TurboMind cannot run layers and heads of these shapes, or None."""
    text, vision, moe = model.text, model.vision, model.text.moe
    sparse = text.architecture == "Qwen2MoeForCausalLM"
    if moe and (moe.step != 1 or (sparse and moe.layers < text.layers)):
        return f"{_TURBOMIND} treats every layer as sparse, and this model has dense layers"
    heads = _TURBOMIND_HEADS.get(vision.kind) if vision else None
    if vision and heads and vision.head_dim not in heads:
        channels = " or ".join(map(str, sorted(heads)))
        return f"{_TURBOMIND} runs vision heads of {channels} channels, not {vision.head_dim}"
    if text.delta and (text.delta.key_dim, text.delta.value_dim) != (128, 128):
        return f"{_TURBOMIND} runs gated delta nets with heads of 128 channels only"
    return None


def _packed_on_turbomind(text: TextDims, packed: Quantization) -> str | None:
    """Return why TurboMind cannot run these quantised weights, or None."""
    # TurboMind multiplies weights of latent attention as stored:
    # lmdeploy builders/mla.py::fold_kv_b #5bb339
    if text.mla:
        return "turbofit has no account of TurboMind's latent attention in quantised checkpoints"
    # TurboMind joins packed and unpacked projections, which gptq does not allow:
    # lmdeploy builders/deltanet.py::fuse_gdn #e0a1b5
    if packed.method == "gptq" and text.delta is not None:
        inner = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
        if not all(packed.exempts(it, n) for it in inner for n in range(text.layers)):
            return f"{_TURBOMIND} cannot widen gptq weights for gated delta nets: take awq"
    if packed.method == "fp8" and _splits_scales(text, packed):
        return f"{_TURBOMIND} cannot reorder fp8 scales of heads of {text.head_dim} channels"
    if packed.group_size not in _TURBOMIND_GROUPS.get(packed.method, {packed.group_size}):
        return f"{_TURBOMIND} does not run {packed.method} groups of {packed.group_size}"
    return _partial_group(text, packed)


def _partial_group(text: TextDims, packed: Quantization) -> str | None:
    """Return the reason if a layer's inputs are not whole quantisation groups, or None.

    TurboMind then fails at load, or at its first forward pass. Source: the kernels' constraints on
    shapes, seen on pretend GPUs of sm_89 and sm_90 in AWQ and fp8;
    lmdeploy builders/ffn.py::_pad_ffn_for_tp #23728b
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
                f"{_TURBOMIND} needs whole groups of {size}, unlike the {whose} {channels} channels"
            )
    return None


def _splits_scales(text: TextDims, packed: Quantization) -> bool:
    """Return whether TurboMind would have to split a block of fp8 scales that heads share.

    Loading then fails at a view of the scales:
    lmdeploy turbomind/models/utils.py::reorder_rotary_emb #cad65f
    """
    if packed.group_size % text.head_dim:
        return False
    group_heads = packed.group_size // text.head_dim
    return any(-(-heads // group_heads) % group_heads for heads in (text.heads, text.kv_heads))


def _pytorch(model: Model) -> str | None:
    """Return why LMDeploy's PyTorch engine cannot run the model, or None."""
    vision = model.vision
    if model.architecture in _NOT_PYTORCH:
        return _NOT_PYTORCH[model.architecture]
    if vision and vision.kind == "siglip":
        return f"LMDeploy {REFERENCE} runs {model.architecture} with a CLIP tower only, not SigLIP"
    return None if model.quantization is None else _packed_on_pytorch(model, model.quantization)


def _packed_on_pytorch(model: Model, packed: Quantization) -> str | None:
    """Return why LMDeploy's PyTorch engine cannot run a model's quantised weights, or None."""
    kind, method = model.architecture, packed.method
    if kind in _SIXTEEN_BITS:
        return _SIXTEEN_BITS[kind].format(method=method)
    if method == "compressed-tensors":
        return _compressed_on_pytorch(model, packed)
    # lmdeploy pytorch/models/qwen3_5.py::Qwen3_5GatedDeltaNet.__init__ #021893
    if method == "awq" and model.text.delta is not None:
        return "turbofit has no account of AWQ with gated delta nets: take fp8 or 16 bits"
    if method == "awq" and kind in PROJECTOR_AS_TEXT:
        return f"{_PYTORCH} expects the projector in awq, too"
    if method == "awq" and kind != _KIMI and model.text.moe:
        return f"{_PYTORCH} has no experts in awq"
    if method in {"gptq", "mxfp4"}:
        return f"{_PYTORCH} does not read {method} weights"
    # lmdeploy pytorch/config.py::_parse_compressed_tensors_config #4dbcec
    if kind == _KIMI:
        return f"turbofit has no account of Kimi-K2.5 in {method}: take 4 bits or 16"
    return None


def _compressed_on_pytorch(model: Model, packed: Quantization) -> str | None:
    """Return why LMDeploy's PyTorch engine cannot run a model in compressed-tensors, or None."""
    kind, is_kimi = model.architecture, model.architecture == _KIMI
    # The config exempts layers by name, but this class makes layers without their names:
    # lmdeploy models/deepseek_v2.py::DeepseekV2Attention.__init__ #a34f86
    if not is_kimi and model.text.mla is not None:
        return f"LMDeploy {REFERENCE}'s {kind} does not start with compressed-tensors"
    if not (is_kimi and packed.of_experts):
        return f"{_PYTORCH} reads compressed-tensors for experts only"
    if packed.group_size != _KIMI_GROUP:
        return (
            f"{_PYTORCH} reads groups of {_KIMI_GROUP} in compressed-tensors, not of"
            f" {packed.group_size}"
        )
    return None


def _transformers(model: Model) -> str | None:
    """Return why Transformers cannot run the model, or None."""
    if model.text.mla is not None:
        # Transformers caches keys and values of every head, while LMDeploy caches the latent.
        return "turbofit has no account of Transformers' multi-head latent attention"
    for name in (model.architecture, model.text.architecture):
        if name in _REMOTE_CODE:
            return f"Transformers has no {name}: only the checkpoint's own code defines it"
        if name in _LMDEPLOY_ALONE:
            return f"turbofit has no account of {name} in Transformers"
    if model.quantization is not None:
        return f"Transformers runs {model.quantization.method} weights only with further packages"
    return None
