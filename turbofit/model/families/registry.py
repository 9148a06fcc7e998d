"""The table of the families' readers by architecture; each new family is registered here."""

from __future__ import annotations

from typing import Final

from turbofit.model.families import (
    eva_clip,
    gemma3,
    glm,
    idefics3,
    internvl,
    kimi,
    llama4,
    llava,
    mllama,
    phi3_v,
    qwen3_vl,
    qwen_omni,
    qwen_vl,
)
from turbofit.model.families.dims import CheckpointConfig, Dims, Reader, refusal
from turbofit.model.families.text import TEXT_ARCHITECTURES, read_text

#: The readers by ``architectures[0]`` of config.json.
VISION_READERS: Final[dict[str, Reader]] = {
    "ChatGLMForConditionalGeneration": glm.read_chatglm,
    "ChatGLMModel": glm.read_chatglm,
    "CogVLMForCausalLM": eva_clip.read_cogvlm,
    "Gemma3ForConditionalGeneration": gemma3.read,
    "Glm4vForConditionalGeneration": glm.read_glm4v,
    "Idefics3ForConditionalGeneration": idefics3.read,
    "InternS1ForConditionalGeneration": internvl.read_hf,
    "InternS1ProForConditionalGeneration": qwen3_vl.read_intern_s1_pro,
    "InternS1_1_ForConditionalGeneration": qwen3_vl.read_intern_s1_pro,
    "InternS2PreviewForConditionalGeneration": qwen3_vl.read_qwen3_5,
    "InternVLChatModel": internvl.read_chat,
    "InternVLForConditionalGeneration": internvl.read_hf,
    "KimiK25ForConditionalGeneration": kimi.read,
    "Llama4ForConditionalGeneration": llama4.read,
    "LlavaForConditionalGeneration": llava.read,
    "LlavaNextForConditionalGeneration": llava.read_next,
    "LlavaOnevisionForConditionalGeneration": llava.read_onevision,
    "MllamaForConditionalGeneration": mllama.read,
    "Phi3VForCausalLM": phi3_v.read,
    "Qwen2VLForConditionalGeneration": qwen_vl.read,
    "Qwen2_5OmniForConditionalGeneration": qwen_omni.read_qwen2_5,
    "Qwen2_5OmniModel": qwen_omni.read_qwen2_5,
    "Qwen2_5OmniThinkerForConditionalGeneration": qwen_omni.read_qwen2_5,
    "Qwen2_5_VLForConditionalGeneration": qwen_vl.read,
    "Qwen3OmniMoeForConditionalGeneration": qwen_omni.read,
    "Qwen3VLForConditionalGeneration": qwen3_vl.read,
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl.read,
    "Qwen3_5ForConditionalGeneration": qwen3_vl.read_qwen3_5,
    "Qwen3_5MoeForConditionalGeneration": qwen3_vl.read_qwen3_5,
    "SmolVLMForConditionalGeneration": idefics3.read,
}

#: Readers that need no preprocessor_config.json, since config.json has the image limits.
_WITHOUT_PROCESSOR: Final[frozenset[Reader]] = frozenset(
    {
        eva_clip.read_cogvlm, glm.read_chatglm, internvl.read_chat, llava.read, llava.read_next,
        llava.read_onevision, mllama.read,
    }
)  # fmt: skip
#: Architectures whose videos LMDeploy accepts and turbofit plans for.
WATCHING: Final = frozenset(
    name
    for name, reader in VISION_READERS.items()
    if reader in (qwen3_vl.read, qwen3_vl.read_qwen3_5)
)


def read_dims(parts: CheckpointConfig) -> Dims:
    """Read the dims and the image rule of a checkpoint.

    Raises:
        UsageError: a key is missing or invalid, or turbofit has no account of the architecture.
    """
    if parts.architecture in TEXT_ARCHITECTURES:
        return Dims(read_text(parts.config, parts.architecture))
    reader = VISION_READERS.get(parts.architecture)
    if reader is None:
        raise refusal(parts.architecture)
    if parts.processor is None and reader not in _WITHOUT_PROCESSOR:
        parts.warnings.append(
            "there is no preprocessor_config.json: Transformers' default image limits are"
            " assumed, and LMDeploy will not start without it"
        )
    return reader(parts)
