"""The input and output types of the families' readers, and functions that readers share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Final, Literal, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images import AnyImageRule
from turbofit.core.model import TextDims, VisionDims
from turbofit.core.presets import read_preset
from turbofit.core.struct import Struct
from turbofit.core.version import REFERENCE
from turbofit.model.config import Section
from turbofit.model.families.text import TEXT_ARCHITECTURES, read_text

#: The architecture of a language model by its ``model_type``, for configs without architecture.
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
#: The field of `VisionDims`, and its largest valid value, by the key in a vision config.
_TOWER_KEYS: Final = {
    **dict.fromkeys(("num_hidden_layers", "depth"), ("layers", 1 << 10)),
    "hidden_size": ("hidden", 1 << 16),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "num_heads"), ("heads", 1 << 12)),
    "intermediate_size": ("intermediate", 1 << 20),
    "patch_size": ("patch_size", 1 << 10),
    "image_size": ("image_size", 1 << 14),
    **dict.fromkeys(("num_channels", "in_channels"), ("channels", 64)),
    "temporal_patch_size": ("temporal_patch", 64),
    "spatial_merge_size": ("merge", 16),
}
_BY_HAND: Final = {
    "turbomind": "TurboMind runs it{on}: start LMDeploy by hand with a low --cache-max-entry-count",
    "pytorch": "LMDeploy's PyTorch engine runs it{on}: start LMDeploy by hand (--backend pytorch)"
    " with a low --cache-max-entry-count",
}


class CheckpointConfig(NamedTuple):
    """The files that determine a checkpoint's dims.

    ``processor`` and ``video`` are the settings of the checkpoint's image and video processors. A
    reader may append to ``warnings``.
    """

    config: Section
    architecture: str
    processor: Section | None
    warnings: list[str]
    video: Section | None = None

    @property
    def images(self) -> Section:
        """The image processor's settings; empty if there is no such file."""
        return self.processor or Section({}, "preprocessor_config.json")


class Dims(NamedTuple):
    """The dims of language model and tower, and the rule that turns images into tokens."""

    text: TextDims
    vision: VisionDims | None = None
    rule: AnyImageRule | None = None


#: Reads a family's config; refuses contradictions and models that LMDeploy cannot run (UsageError).
Reader = Callable[[CheckpointConfig], Dims]


def inner_text(config: Section, outer: str) -> TextDims:
    """Read the language model inside a vision model of the architecture ``outer``.

    ``config`` is the language model's section; the first of its ``architectures`` identifies the
    language model.

    Raises:
        UsageError: ``config`` names no architecture, or LMDeploy does not serve its architecture
            inside a vision model.
    """
    names = config.strings("architectures")
    config.refuse_if(not names, "architectures", "is missing, and LMDeploy does not guess it")
    if names[0] not in TEXT_ARCHITECTURES:
        raise inner_refusal(outer, names[0])
    return read_text(config, names[0])


def read_tower(section: Section, keys: Mapping[str, int | None], **other_fields: Any) -> VisionDims:
    """Read a vision tower; refuse a number of heads that does not divide the channels.

    Args:
        section: the tower's config.
        keys: the keys to read, each with its default; None: the key is required.
        other_fields: fields of `VisionDims` from other sources.
    """
    fields: dict[str, Any] = {}
    for key, default in keys.items():
        field, high = _TOWER_KEYS[key]
        fields[field] = section.integer(key, default, high=high)
    vision = VisionDims(**fields, **other_fields)
    heads = next(key for key in keys if _TOWER_KEYS[key][0] == "heads")
    section.divisor(heads, vision.hidden, "channels", keys[heads])
    return vision


def whole_windows(section: Section, vision: VisionDims) -> VisionDims:
    """Return the tower; refuse a tower whose image does not consist of whole windows.

    A window has ``merge`` x ``merge`` patches.

    Raises:
        UsageError: the image does not consist of whole windows.
    """
    size, window = vision.image_size or 0, vision.patch_size * vision.merge
    section.refuse_if(
        size % window, "image_size", f"{size} is not whole windows of {window} pixels"
    )
    return vision


def tied_text(config: Section, architecture: str, *, default: bool = False) -> TextDims:
    """Read the language model in ``text_config``.

    The outer config says whether head and embeddings are one tensor; ``default`` replaces a missing
    key.
    """
    tied = config.boolean("tie_word_embeddings", default)
    return replace(read_text(config.part("text_config"), architecture), tie_word_embeddings=tied)


def nested_text(parts: CheckpointConfig, default: str) -> TextDims:
    """Read the language model in ``text_config``, which has the Transformers format.

    The first of the ``architectures`` in ``text_config`` identifies the language model, else the
    ``model_type``. ``default`` is the ``model_type`` that the outer config class assumes.

    Raises:
        UsageError: LMDeploy does not serve this language model inside this vision model.
    """
    config = parts.config
    section = config.part("text_config")
    tied = config.boolean("tie_word_embeddings", False)
    names = section.strings("architectures")
    if not names:
        parts.warnings.append(
            f"{section.what} names no architecture: Transformers reads model_type, but LMDeploy's"
            " PyTorch engine does not start"
        )
    kind = section.string("model_type", default)
    name = names[0] if names else _MODEL_TYPES.get(kind, kind)
    if name not in TEXT_ARCHITECTURES:
        raise inner_refusal(parts.architecture, name)
    text = read_text(section, name, tied=tied)
    # True in the outer config also wins over false in the inner one.
    return replace(text, tie_word_embeddings=True) if tied else text


class UnsupportedFamily(Struct, forbid_unknown_fields=True):
    """A family that turbofit has no account of.

    ``engine`` is the engine of LMDeploy that runs the family, or None. ``names`` are beginnings of
    names that people type; ``words`` may stand anywhere in such a name. ``elsewhere`` are other
    programs that list the family among their models. ``older`` is a clause on older releases of
    LMDeploy that ran the family. ``needs`` are the cards on which ``engine`` runs it; empty: any.
    """

    name: str
    architectures: tuple[str, ...]
    engine: Literal["turbomind", "pytorch"] | None = None
    names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    why: str = ""
    hint: str = ""
    older: str = ""
    needs: str = ""

    def refusal(self) -> UsageError:
        """Return the error that says why the family has no account, and what to do."""
        if self.engine is not None:
            message = f"turbofit does not account for {self.name} yet"
            hint = _BY_HAND[self.engine].format(on=f" on {self.needs}" if self.needs else "")
        else:
            message = f"LMDeploy {REFERENCE} does not run {self.name}"
            if self.older:
                message = f"turbofit has no account of {self.name} with any release of LMDeploy:"
                message += f" {self.older}, and {REFERENCE} does not"
            runs = "run" if len(self.elsewhere) > 1 else "runs"
            hint = f"{' and '.join(self.elsewhere)} {runs} it"
            if not self.elsewhere:
                hint = "take a version of the model in Hugging Face's own format, if there is one"
        message += f": {self.why}" if self.why else ""
        return UsageError(message, hint=self.hint or hint)


@cache
def unplanned() -> tuple[UnsupportedFamily, ...]:
    """Return the families of `presets/families/unplanned.yaml`, which have no account."""
    return read_preset("families", "unplanned", tuple[UnsupportedFamily, ...], "models")


def refusal(architecture: str) -> UsageError:
    """Return the error for a checkpoint of an architecture that has no account."""
    for known in unplanned():
        if architecture in known.architectures:
            return known.refusal()
    return UsageError(
        f"turbofit does not know the architecture {architecture[:80]!r}",
        hint="`turbofit models` names one of each family that is known",
    )


def inner_refusal(outer: str, inner: str) -> UsageError:
    """Return the error for a vision model ``outer`` with the language model ``inner``."""
    names = {one: family.name for family in unplanned() for one in family.architectures}
    return UsageError(
        f"turbofit does not account for {outer} with {names.get(inner, inner[:80])} inside",
        hint="take a version with a language model that is known",
    )


def named_refusal(name: str) -> UsageError | None:
    """Return the error for a name or architecture that `unplanned` lists; else None."""
    return _longest_match(name, unplanned())


def purpose_refusal(name: str) -> UsageError | None:
    """Return the error for a model that does not chat, but has a chat model's config.json.

    ``name`` is a hub id or the path of a folder. Return None if no word in ``name`` tells another
    purpose, such as ``rerank``.
    """
    return _longest_match(name, [family for family in unplanned() if family.words])


def _longest_match(name: str, families: Iterable[UnsupportedFamily]) -> UsageError | None:
    """Return the error of the family that a name means; None if the name means none of them.

    A family is matched by its words, names and architectures; the longest match decides.
    """
    typed = re.sub(r"[\s._-]+", "-", name.rstrip("/").rpartition("/")[2].lower())
    matches = [
        (len(known), family)
        for family in families
        for known in (*family.words, *family.names, *family.architectures)
        if (known in family.words and known in typed) or _begins(typed, known.lower())
    ]
    return max(matches, key=lambda pair: pair[0])[1].refusal() if matches else None


def _begins(typed: str, beginning: str) -> bool:
    """Return whether a typed name is ``beginning`` or continues it.

    gemma-4-31b continues gemma-4; gemma-4b does not.
    """
    pieces = re.split(r"[._-]+", beginning)
    end = r"(?![a-z0-9])" if beginning[-1].isdigit() else r"(?![a-z])"
    return re.match("-?".join(map(re.escape, pieces)) + end, typed) is not None
