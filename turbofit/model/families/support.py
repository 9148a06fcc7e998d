"""Which models the account covers, and a plain answer for those that it does not."""

from __future__ import annotations

from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.model import Model

__all__ = ["TURBOMIND_NOT_YET", "engine_problem", "inner_refusal", "refusal"]

#: TurboMind 0.18 runs these, but their memory is of another kind.
TURBOMIND_NOT_YET: Final = {
    "Qwen3_5ForConditionalGeneration": "Qwen3.5 (gated delta net)",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3.5-MoE (gated delta net)",
    "InternS2PreviewForConditionalGeneration": "Intern-S2 (gated delta net)",
    "InternS2MobiusForConditionalGeneration": "Intern-S2 Mobius (gated delta net)",
    "InternS1ForConditionalGeneration": "Intern-S1",
    "Glm4MoeLiteForCausalLM": "GLM-4-MoE-Lite (multi-head latent attention)",
    "GptOssForCausalLM": "gpt-oss (sliding windows and attention sinks)",
}

#: LMDeploy 0.18 runs these on its PyTorch engine only.
_PYTORCH: Final = frozenset(
    {
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "CogVLMForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3NextForCausalLM",
        "Qwen3OmniMoeForConditionalGeneration",
        "InternS1ProForConditionalGeneration",
        "InternS1_1_ForConditionalGeneration",
        "ChatGLMModel",
        "ChatGLMForConditionalGeneration",
        "Glm4ForCausalLM",
        "Glm4vForConditionalGeneration",
        "Glm4MoeForCausalLM",
        "GlmMoeDsaForCausalLM",
        "Phi3ForCausalLM",
        "Phi3VForCausalLM",
        "PhiMoEForCausalLM",
        "MiniCPM3ForCausalLM",
        "MiniCPMV",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "MistralForCausalLM",
        "DeepseekForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM",
        "KimiK25ForConditionalGeneration",
        "SDARForCausalLM",
        "SDARMoeForCausalLM",
        "HYV3ForCausalLM",
        "InternLM2ForRewardModel",
        "Qwen2ForRewardModel",
    }
)

#: No engine of LMDeploy 0.18 runs these.
_NOT_IN_LMDEPLOY: Final = frozenset(
    {
        "MllamaForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaQwenForCausalLM",
        "LlavaLlamaForCausalLM",
        "LlavaMistralForCausalLM",
        "MolmoForCausalLM",
        "MultiModalityCausalLM",
        "InternLMForCausalLM",
        "InternLM2VEForCausalLM",
        "InternLMXComposer2ForCausalLM",
        "QWenLMHeadModel",
        "BaichuanForCausalLM",
        "BaiChuanForCausalLM",
        "Starcoder2ForCausalLM",
    }
)

_PYTORCH_HINT: Final = (
    "LMDeploy's PyTorch engine runs it (--backend pytorch); turbofit does not account for that "
    "engine yet"
)


def refusal(architecture: str) -> UsageError:
    """Why there is no account for a checkpoint of this architecture."""
    name = architecture[:80]
    if name in TURBOMIND_NOT_YET:
        return UsageError(
            f"turbofit does not account for {TURBOMIND_NOT_YET[name]} yet",
            hint="TurboMind runs it: start LMDeploy by hand with a low --cache-max-entry-count",
        )
    if name in _PYTORCH:
        return UsageError(f"TurboMind does not run {name}", hint=_PYTORCH_HINT)
    if name == "LlavaLlamaForCausalLM":
        return UsageError(
            f"LMDeploy 0.18 does not run LLaVA's original format ({name})",
            hint="convert it to the hf format: turbofit merge BASE OUT (docs/merge.md)",
        )
    if name in _NOT_IN_LMDEPLOY:
        return UsageError(
            f"LMDeploy 0.18 does not run {name}",
            hint="Hugging Face Transformers may; turbofit does not account for that engine yet",
        )
    return UsageError(
        f"turbofit does not know the architecture {name!r}",
        hint="InternVL, Qwen2-VL, Qwen2.5-VL, Llama, InternLM2/3, Qwen2/3 and Mixtral are known",
    )


def inner_refusal(outer: str, inner: str) -> UsageError:
    """Why there is no account for a vision model with this language model inside."""
    if inner in TURBOMIND_NOT_YET:
        return UsageError(
            f"turbofit does not account for {outer} with {TURBOMIND_NOT_YET[inner]} inside yet",
            hint="TurboMind runs it: start LMDeploy by hand with a low --cache-max-entry-count",
        )
    return UsageError(
        f"TurboMind does not run {outer} with {inner[:80]} inside", hint=_PYTORCH_HINT
    )


def engine_problem(model: Model, engine: str) -> str | None:
    """Why an engine does not run a model, None where it does.

    Args:
        model: the checkpoint.
        engine: ``turbomind``, ``pytorch`` (both LMDeploy's) or ``transformers``.
    """
    native = model.vision is None or model.vision.kind in {"internvit", "qwen2vit", "qwen2_5vit"}
    if engine == "turbomind" and not native:
        return f"TurboMind 0.18 has no encoder for {model.name}'s vision tower"
    return None
