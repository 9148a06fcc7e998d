"""What a family's reader is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.images import AnyImageRule
from turbofit.core.model import TextDims, VisionDims
from turbofit.model.config import Section
from turbofit.model.families.support import inner_refusal
from turbofit.model.families.text import TEXT_ARCHITECTURES, read_text

__all__ = ["CheckpointConfig", "Dims", "Reader", "attention_heads", "inner_text", "nested_text"]

#: ``model_type`` of a language model → its architecture, where a config names only the former.
_MODEL_TYPES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


class CheckpointConfig(NamedTuple):
    """The JSON files of a checkpoint that say its dims; a reader adds to ``warnings``.

    ``processor`` is the image processor's settings, None where the checkpoint has none; ``video``
    the video processor's.
    """

    config: Section
    architecture: str
    processor: Section | None
    warnings: list[str]
    video: Section | None = None

    def warn_without_processor(self) -> None:
        """Say that image limits are assumed, where no file tells them."""
        if self.processor is None:
            self.warnings.append(
                "there is no preprocessor_config.json: Transformers' default image limits are"
                " assumed, and LMDeploy will not start without it"
            )


class Dims(NamedTuple):
    """Dims of both halves and the rule that turns images into tokens."""

    text: TextDims
    vision: VisionDims | None = None
    rule: AnyImageRule | None = None


Reader = Callable[[CheckpointConfig], Dims]


def inner_text(config: Section, outer: str) -> TextDims:
    """The language model inside a vision model, by its own ``architectures[0]``.

    Raises:
        UsageError: it names none, or one that turbofit has no account of.
    """
    names = config.strings("architectures")
    if not names:
        raise config.error("architectures", "is missing, and LMDeploy does not guess it")
    if names[0] not in TEXT_ARCHITECTURES:
        raise inner_refusal(outer, names[0])
    return read_text(config, names[0])


def attention_heads(section: Section, key: str, hidden: int, default: int | None = None) -> int:
    """Heads among which ``hidden`` channels are split evenly.

    Raises:
        UsageError: the key is missing where there is no default, or they do not divide.
    """
    heads = section.integer(key, default, high=1 << 12)
    if hidden % heads:
        raise section.error(key, f"{heads} does not divide {hidden} channels")
    return heads


def nested_text(parts: CheckpointConfig, default: str) -> TextDims:
    """The language model inside a model in the Transformers format, by class or ``model_type``.

    config.json describes it under ``text_config``; absent means Transformers' defaults.

    Args:
        parts: the checkpoint's.
        default: the ``model_type`` that the outer config class assumes.

    Raises:
        UsageError: one that turbofit has no account of.
    """
    config = parts.config
    section = config.part("text_config")
    tied = config.boolean("tie_word_embeddings", False)
    names = section.strings("architectures")
    if not names:
        parts.warnings.append(
            f"{section.what} names no architecture: Transformers goes by model_type, LMDeploy's"
            " PyTorch engine does not start"
        )
    kind = section.string("model_type", default)
    name = names[0] if names else _MODEL_TYPES.get(kind, kind)
    if name not in TEXT_ARCHITECTURES:
        raise inner_refusal(parts.architecture, name)
    text = read_text(section, name, tied=tied)
    return replace(text, tie_word_embeddings=True) if tied else text
