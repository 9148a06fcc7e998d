"""Where Transformers 5 keeps the parts of each model: the names that a device map must use.

A map names every parameter and buffer, bare ones (``image_newline``) too: what it leaves out lands
on the CPU. Proved against the classes themselves in ``tests/memory/transformers``.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.struct import Struct

__all__ = ["Layout", "layout_of"]


class Layout(Struct):
    """Module names: ``text`` holds ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.

    ``first`` are the modules and bare parameters beside the language model: vision tower, projector
    and what joins their features. ``keeps_states``: whether the outputs of all layers of the tower
    live until its end, as the families do that pick a layer by its number.
    """

    text: str
    first: tuple[str, ...] = ()
    keeps_states: bool = False


_TEXT: Final = Layout(text="model")
_INSIDE: Final = "model.language_model"
_LLAVA: Final = ("model.vision_tower", "model.multi_modal_projector")

_IDEFICS3: Final = Layout(text="model.text_model", first=("model.vision_model", "model.connector"))

#: The thinker alone: `launch.fallback.generating` loads no more of it.
_QWEN2_5_OMNI: Final = Layout(text="model", first=("audio_tower", "visual"))

_LAYOUTS: Final[dict[str, Layout]] = {
    "LlavaForConditionalGeneration": Layout(text=_INSIDE, first=_LLAVA, keeps_states=True),
    "LlavaNextForConditionalGeneration": Layout(
        text=_INSIDE, first=(*_LLAVA, "model.image_newline"), keeps_states=True
    ),
    "LlavaOnevisionForConditionalGeneration": Layout(
        text=_INSIDE, first=(*_LLAVA, "model.image_newline"), keeps_states=True
    ),
    "MllamaForConditionalGeneration": Layout(
        text=_INSIDE, first=("model.vision_model", "model.multi_modal_projector"), keeps_states=True
    ),
    "Idefics3ForConditionalGeneration": _IDEFICS3,
    "SmolVLMForConditionalGeneration": _IDEFICS3,
    "InternVLForConditionalGeneration": Layout(text=_INSIDE, first=_LLAVA, keeps_states=True),
    "Qwen2VLForConditionalGeneration": Layout(text=_INSIDE, first=("model.visual",)),
    "Qwen2_5_VLForConditionalGeneration": Layout(text=_INSIDE, first=("model.visual",)),
    "Qwen2_5OmniForConditionalGeneration": _QWEN2_5_OMNI,
    "Qwen2_5OmniModel": _QWEN2_5_OMNI,
    "Qwen2_5OmniThinkerForConditionalGeneration": _QWEN2_5_OMNI,
    "Qwen3VLForConditionalGeneration": Layout(text=_INSIDE, first=("model.visual",)),
    "LlamaForCausalLM": _TEXT,
    "MistralForCausalLM": _TEXT,
    "MixtralForCausalLM": _TEXT,
    "Qwen2ForCausalLM": _TEXT,
    "Qwen3ForCausalLM": _TEXT,
    "Qwen2MoeForCausalLM": _TEXT,
    "Qwen3MoeForCausalLM": _TEXT,
}


def layout_of(model: Model) -> Layout:
    """The layout of a model's class.

    Raises:
        UsageError: the class is not Transformers' own, or the checkpoint is quantised.
    """
    if model.quantization is not None:
        raise UsageError(
            f"the fallback engine runs no {model.quantization.method} checkpoints",
            hint="give the 16-bit checkpoint, or leave --engine to turbofit",
        )
    found = _LAYOUTS.get(model.architecture)
    if found is None:
        raise UsageError(
            f"the fallback engine does not run {model.architecture[:80]}: turbofit has no map of "
            "it, and a class that only the checkpoint's own code defines cannot be served",
            hint="give the checkpoint in Transformers' own format (its name often ends in -hf)",
        )
    return found
