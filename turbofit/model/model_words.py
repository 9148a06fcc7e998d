"""Models that a text names, also beside Chinese words, by the presets they mean."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

from turbofit.model.presets import find_preset, known_presets

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names of models that have another name in the presets. The original LLaVA and its LoRA stand for
#: the checkpoint that `turbofit merge` makes of them.
_SPELLINGS: Final = (
    (r"llava-?v?1[.-]5-7b|llava-7b", "llava-1.5-7b"),
    (r"llava-?v?1[.-]5-13b", "llava-1.5-13b"),
    (r"llava-?onevision.*7b", "llava-onevision-7b"),
    (r"cogvlm2", "cogvlm2-19b"),
    (r"cogvlm", "cogvlm-17b"),
    (r"llama-?3[.-]2-11b-vision", "llama-3.2-11b-vision"),
)
#: A path or a name, also beside Chinese words; its parts; and CogVLM, which has no number.
_TOKEN: Final = re.compile(r"[A-Za-z0-9_./-]+")
_NUMBERED: Final = re.compile(r"[A-Za-z].*\d")
_COGVLM: Final = re.compile(r"(?<![A-Za-z])[Cc][Oo][Gg]VLM(?![A-Za-z])")


@cache
def families() -> tuple[str, ...]:
    """The beginnings of model names; a line without any of them is skipped."""
    words = {match[0] for name in known_presets() if (match := re.match("[a-z]+", name))}
    return tuple(words | {"cogvlm", "llava", "llama"})


def names_in(text: str) -> Iterator[str]:
    """Yields names with a number, each as a path up to the last part that has one."""
    for token in _TOKEN.findall(text):
        parts = token.rstrip(".").split("/")
        while parts and not _NUMBERED.search(parts[-1]):
            parts.pop()
        if parts:
            yield "/".join(parts)
    yield from _COGVLM.findall(text)


@lru_cache(1024)
def preset_of(name: str) -> str | None:
    """The preset that a name in a log means, which may be a folder's; or None."""
    plain = name.lower().replace("_", "-")
    for pattern, preset in _SPELLINGS:
        if re.search(pattern, plain):
            return preset
    return find_preset(name) or find_preset(name.rstrip("/").rpartition("/")[2])
