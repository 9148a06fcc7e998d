"""Which models the account covers, and a plain answer for those that it does not."""

from __future__ import annotations

from typing import Final

from turbofit.core.errors import UsageError
from turbofit.model.families.engines import engine_problem

__all__ = ["TURBOMIND_NOT_YET", "engine_problem", "inner_refusal", "refusal"]

#: TurboMind 0.18 runs these, but their memory is of another kind.
TURBOMIND_NOT_YET: Final = {
    "InternS2PreviewForConditionalGeneration": "Intern-S2 (gated delta net)",
    "InternS2MobiusForConditionalGeneration": "Intern-S2 Mobius (gated delta net)",
    "InternS1ForConditionalGeneration": "Intern-S1",
    "Glm4MoeLiteForCausalLM": "GLM-4-MoE-Lite (multi-head latent attention)",
    "GptOssForCausalLM": "gpt-oss (sliding windows and attention sinks)",
}

#: LMDeploy 0.18's PyTorch engine runs these, and turbofit has no account of them.
_PYTORCH_NOT_YET: Final = frozenset(
    {
        "Qwen3NextForCausalLM",
        "Qwen3OmniMoeForConditionalGeneration",
        "InternS1ProForConditionalGeneration",
        "InternS1_1_ForConditionalGeneration",
        "Glm4MoeForCausalLM",
        "GlmMoeDsaForCausalLM",
        "PhiMoEForCausalLM",
        "MiniCPM3ForCausalLM",
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

#: What to know of some architectures beside that there is no account of them.
_NOTES: Final = {
    "MiniCPMV": "LMDeploy 0.18's PyTorch engine has a class for MiniCPM-V 2.6 alone: its front end"
    " lets 2.5 through and then asks a model that it has not built; of 2.6 the processor is the"
    " checkpoint's own code",
}

#: No engine of LMDeploy 0.18 runs these.
_NOT_IN_LMDEPLOY: Final = frozenset(
    {
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
    "LMDeploy's PyTorch engine runs it: start that by hand (--backend pytorch) with a low "
    "--cache-max-entry-count"
)


def refusal(architecture: str) -> UsageError:
    """Why there is no account for a checkpoint of this architecture."""
    name = architecture[:80]
    if name in TURBOMIND_NOT_YET:
        return UsageError(
            f"turbofit does not account for {TURBOMIND_NOT_YET[name]} yet",
            hint="TurboMind runs it: start LMDeploy by hand with a low --cache-max-entry-count",
        )
    if name == "LlavaLlamaForCausalLM":
        return UsageError(
            f"LMDeploy 0.18 does not run LLaVA's original format ({name})",
            hint="convert it to the hf format: turbofit merge BASE OUT (docs/merge.md)",
        )
    if name in _NOTES:
        return UsageError(
            f"turbofit does not account for {name}: {_NOTES[name]}",
            hint="start that by hand (--backend pytorch) with a low --cache-max-entry-count",
        )
    if name in _PYTORCH_NOT_YET:
        return UsageError(f"turbofit does not account for {name} yet", hint=_PYTORCH_HINT)
    if name in _NOT_IN_LMDEPLOY:
        return UsageError(
            f"LMDeploy 0.18 does not run {name}, and turbofit does not account for it",
            hint="take a version of the model in Hugging Face's own format, if there is one",
        )
    return UsageError(
        f"turbofit does not know the architecture {name!r}",
        hint="`turbofit models` names one of each family that is known",
    )


def inner_refusal(outer: str, inner: str) -> UsageError:
    """Why there is no account for a vision model with this language model inside."""
    if inner in TURBOMIND_NOT_YET:
        return UsageError(
            f"turbofit does not account for {outer} with {TURBOMIND_NOT_YET[inner]} inside yet",
            hint="TurboMind runs it: start LMDeploy by hand with a low --cache-max-entry-count",
        )
    known = inner in _PYTORCH_NOT_YET
    return UsageError(
        f"turbofit does not account for {outer} with {inner[:80]} inside",
        hint=_PYTORCH_HINT if known else "take a version with a language model that is known",
    )
