"""Applies LMDeploy's ``--hf-overrides`` to the planned model.

LMDeploy reads the model's dimensions from config.json before it applies the overrides. So only two
keys have an account: the longest context, and the scaling of positions.
"""

from __future__ import annotations

import json
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.model.config import Section, parse_json

_OPTION: Final = "`--hf-overrides`"
_LENGTH: Final = "max_position_embeddings"
_FIRST_LENGTH: Final = "original_max_position_embeddings"
#: Both names of the scaling of positions; in Transformers 5 they mean the same.
_SCALINGS: Final = ("rope_scaling", "rope_parameters")
#: Types of scaling that both engines of LMDeploy compute without further memory. Source:
#: lmdeploy turbomind/models/utils.py::parse_rope_param #c8c8dd
_TYPES: Final = ("default", "mrope", "linear", "dynamic", "yarn", "llama3")
_UNSCALED: Final = _TYPES[:2]
#: The section of config.json with the language model, if that section is not ``text_config``.
_INSIDE: Final = {
    "InternVLChatModel": ("llm_config",),
    "CogVLMForCausalLM": (),
    "Phi3VForCausalLM": (),
    **dict.fromkeys(
        ("Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"),
        ("thinker_config", "text_config"),
    ),
}
_LARGEST: Final = 1 << 30
_MOST_SCALED: Final = 1e4


def overridden(model: Model, text: str) -> tuple[Model, str]:
    """Return the model with the overrides, and the overrides as JSON for LMDeploy.

    A scaling that lengthens the context also sets ``max_position_embeddings``, by which TurboMind
    computes YaRN's factor. Applying the returned overrides again changes nothing.

    Raises:
        UsageError: the text is no JSON object, or a key has no account.
    """
    whole = parse_json(text.encode(), _OPTION, hint="write it as '{\"KEY\": VALUE}'")
    plain = model.vision is None and model.architecture == model.text.architecture
    path = () if plain else _INSIDE.get(model.architecture, ("text_config",))
    section = whole
    for key in path:
        _refuse_unknown(section, (key,), path)
        section = section.part(key)
    _refuse_unknown(section, (_LENGTH, *_SCALINGS), path)
    longest = _lengthen(model, section)
    changed = replace(model, text=replace(model.text, max_position_embeddings=longest))
    return changed, json.dumps(whole.values)


def _lengthen(model: Model, section: Section) -> int:
    """Return the longest context; add to the section the keys that both engines need for it."""
    longest = section.integer(_LENGTH, model.text.max_position_embeddings, high=_LARGEST)
    given = [part for name in _SCALINGS if (part := section.section(name))]
    if len(given) > 1:
        raise _refusal(f"has both {' and '.join(_SCALINGS)}", "give one: they mean the same")
    for scaling in given:
        kind = scaling.string("rope_type", "") or scaling.string("type", "")
        if kind not in _TYPES:
            raise _refusal(
                f"asks for rope_type {kind[:40]!r}, which has no account",
                f"the types are {', '.join(_TYPES)}",
            )
        scaling.refuse_if(kind not in _UNSCALED and "factor" not in scaling, "factor", "is missing")
        factor = scaling.number("factor", 1.0, low=1.0, high=_MOST_SCALED)
        original_length = scaling.integer(
            _FIRST_LENGTH, model.text.max_position_embeddings, high=_LARGEST
        )
        # A given length is not raised, nor the length at which dynamic scaling begins.
        if kind == "dynamic" or _LENGTH in section:
            continue
        if int(original_length * factor) > longest:
            scaling.values[_FIRST_LENGTH] = original_length
            longest = section.values[_LENGTH] = int(original_length * factor)
    return longest


def _refuse_unknown(section: Section, known: tuple[str, ...], path: tuple[str, ...]) -> None:
    """Refuse the first key that is not ``known``.

    ``path``: the keys that lead to the language model's section; the error names them.
    """
    unknown = next((key for key in section.values if key not in known), None)
    if unknown is not None:
        where = f" inside {'.'.join(path)}" if path else ""
        raise _refusal(
            f"changes {unknown[:80]}, which no account covers",
            f"{', '.join((_LENGTH, *_SCALINGS))}{where} have an account; write others into a"
            " copy's config.json, which plans read",
        )


def _refusal(problem: str, hint: str) -> UsageError:
    return UsageError(f"{_OPTION} {problem}", hint=hint)
