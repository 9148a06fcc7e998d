"""The header-only twin of a model that turbofit knows, from a preset or a hub's headers.

``python -m turbofit.rehearse.checkpoint.twin NAME FOLDER`` writes the twin of a preset.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from turbofit.core.draft import Draft
from turbofit.core.errors import UsageError
from turbofit.core.model import Model, TextDims, VisionDims
from turbofit.memory.engines import LMDEPLOY, engine_named
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import find_preset, nearest_names, preset_model
from turbofit.rehearse.checkpoint import dims
from turbofit.rehearse.checkpoint.header_only import write_model

_DECODERS = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "KimiK2ForCausalLM": "kimi_k2",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "GptOssForCausalLM": "gpt_oss",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "PhiMoEForCausalLM": "phimoe",
    "DeepseekForCausalLM": "deepseek",
    "MiniCPM3ForCausalLM": "minicpm3",
}
#: LMDeploy pytorch/nn/gated_delta.py and pytorch/kernels/cuda/gated_delta_rule.py.
_DELTA_NETS = (
    "its gated delta nets run kernels of fla and TileLang under torch, which are compiled and tuned"
    " on the card"
)
#: Why there is none, where LMDeploy runs the family. Of Llama 4 even Scout is 202 GiB of weights;
#: each rank loads a layer's experts as one tensor, 16 x 5120 x 16384 values of 16 bits.
_WHY_NONE = {
    "Llama4ForCausalLM": (
        "each of at least four processes would load 2.5 GiB of experts at once, more host memory"
        " than a rehearsal may take"
    ),
}
#: Ways of packing for which tensors are written: method, and size of a group.
_PACKED = {("awq", 128), ("fp8", 128), ("mxfp4", 32), ("compressed-tensors", 32)}
_INTERN_S1 = "InternS1ForConditionalGeneration"
_INTERN_S2 = "InternS2PreviewForConditionalGeneration"
_TOWERS = {
    "internvit": "internvit",
    "qwen2vit": "qwen2",
    "qwen2_5vit": "qwen2_5",
    "qwen3vit": "qwen3",
    "moonvit": "moonvit",
}


def _text(text: TextDims) -> dims.RehearsedText:
    if text.architecture not in _DECODERS:
        why = _WHY_NONE.get(text.architecture)
        raise UsageError(
            f"no stand-in checkpoint is made for {text.architecture}" + (f": {why}" if why else ""),
            hint="give the folder of its checkpoint; stand-ins are made for "
            + ", ".join(_DECODERS),
        )
    moe = text.moe
    return dims.RehearsedText(
        arch=_DECODERS[text.architecture],
        hidden=text.hidden,
        layers=text.layers,
        heads=text.heads,
        kv_heads=text.kv_heads,
        inter=text.intermediate,
        vocab=text.vocab,
        head_dim=text.head_dim,
        tied=text.tie_word_embeddings,
        positions=text.max_position_embeddings,
        qk_norm=text.qk_norm,
        experts=dims.RehearsedExperts(
            count=moe.experts,
            per_token=moe.experts_per_token,
            inter=moe.intermediate,
            dense=text.layers - moe.layers,
            shared=moe.shared_intermediate,
            correction=moe.correction,
        )
        if moe
        else None,
        mla=text.mla,
        delta=_delta(text),
        fourier=text.fourier,
        norm_bias=text.norm_bias,
        head_bias=text.head_bias,
    )


def _delta(text: TextDims) -> dims.RehearsedDelta | None:
    delta = text.delta
    if delta is None:
        return None
    return dims.RehearsedDelta(
        interval=text.layers // text.attention_layers,
        key_heads=delta.key_heads,
        value_heads=delta.value_heads,
        key_dim=delta.key_dim,
        value_dim=delta.value_dim,
        kernel=delta.kernel,
    )


def _vision(vision: VisionDims, architecture: str) -> dims.Vision:
    hub = architecture in {"InternVLForConditionalGeneration", _INTERN_S1}
    if vision.kind not in _TOWERS:
        raise UsageError(
            f"no stand-in checkpoint is made for a vision tower of {architecture}",
            hint="give the folder of its checkpoint",
        )
    return dims.Vision(
        kind="internvit_hf" if hub else _TOWERS[vision.kind],
        hidden=vision.hidden,
        layers=vision.layers,
        heads=vision.heads,
        inter=vision.intermediate,
        qk_norm=vision.qk_norm,
        qkv_bias=vision.qkv_bias,
        rms_norm=vision.norm == "rms_norm",
        patch=vision.patch_size,
        image=vision.image_size or 448,
        deepstack=vision.deepstack,
        audio=vision.audio,
    )


def carries_limit(model: Model) -> bool:
    """Whether a stand-in checkpoint is written with the limit of the model's image rule."""
    return model.vision is not None and model.vision.kind in ("internvit", "moonvit")


def twin_of(model: Model) -> dims.RehearsedModel:
    """The dimensions from which a header-only checkpoint is written.

    Raises:
        UsageError: no twin can stand for such a model: its own checkpoint is needed.
    """
    quantization = model.quantization
    packing = (quantization.method, quantization.group_size) if quantization else None
    dense = quantization is not None and not quantization.of_experts
    unmade = dense and (model.text.mla is not None or packing == ("compressed-tensors", 32))
    if quantization and (packing not in _PACKED or unmade):
        raise UsageError(
            f"no stand-in checkpoint is made for {quantization.method} weights",
            hint="give the folder of its checkpoint",
        )
    rule = model.image_rule
    limit = rule.checkpoint_limit if rule and carries_limit(model) else None
    return dims.RehearsedModel(
        name=model.name,
        text=_text(model.text),
        vision=_vision(model.vision, model.architecture) if model.vision else None,
        packing=quantization.method if quantization else "",
        dtype="float16" if model.dtype == "float16" else "bfloat16",
        max_tiles=limit or 12,
        max_patches=(limit or 0) // rule.unit_side**2 if rule else 0,
        intern_s1=model.architecture == _INTERN_S1,
        architecture=model.architecture if model.architecture == _INTERN_S2 else "",
    )


def checkpoint_for(
    model: Model, folder: Path, *, torch: bool = False, draft: Draft | None = None
) -> Path:
    """The model's own folder where its weights are on disk, else a twin made in ``folder``.

    Args:
        model: what is rehearsed.
        folder: where a twin is made.
        torch: the engine runs under torch, and nothing stands in for the kernels of delta nets.
        draft: what drafts for it, perhaps from layers of the same checkpoint.

    Raises:
        UsageError: there is no twin, or that engine cannot be followed with one.
    """
    checkpoint = Path(model.source.checkpoint or model.source.where)
    if model.source.kind in ("folder", "hub_cache") and any(checkpoint.glob("*.safetensors")):
        return checkpoint
    if torch and model.text.delta is not None:
        raise UsageError(
            f"no stand-in checkpoint is made for {model.text.architecture}: {_DELTA_NETS}",
            hint=_delta_hint(model),
        )
    twin = twin_of(model)
    if draft is not None and not draft.has_checkpoint:
        twin = replace(twin, text=replace(twin.text, drafting=draft.text.layers))
    return write_model(twin, folder)


def _delta_hint(model: Model) -> str:
    """What runs the model on pretend GPUs."""
    rehearsal = "turbofit rehearse --engine pytorch tries a plan of it, with flash-linear-attention"
    for name in LMDEPLOY:
        if engine_problem(model, name) is None and not engine_named(name).planned.on_torch:
            return f"--engine {name} runs on pretend GPUs; {rehearsal}"
    return rehearsal


def write_checkpoint(name: str, folder: Path) -> Path:
    """Writes the twin of the preset that ``name`` means; returns the folder.

    Raises:
        UsageError: no preset has this name, or no twin can be made of it.
    """
    preset = find_preset(name)
    if preset is None:
        near = ", ".join(nearest_names(name)) or "listed by turbofit models"
        raise UsageError(f"no preset is named {name}", hint=f"names that are known: {near}")
    return write_model(twin_of(preset_model(preset)), folder)


def main(arguments: list[str]) -> int:
    """The command; returns an exit code."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m turbofit.rehearse.checkpoint.twin NAME FOLDER\n")
        return 2
    try:
        sys.stdout.write(f"{write_checkpoint(arguments[0], Path(arguments[1]))}\n")
    except UsageError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
