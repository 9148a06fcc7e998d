"""Names under which logs and scripts speak of models that presets know by another.

The original LLaVA and its LoRA count as the checkpoint that they become: `turbofit merge` makes it.
"""

from __future__ import annotations

import re
from typing import Final

from turbofit.model.presets import find_preset

_SPELLINGS: Final = (
    (r"llava-?v?1[.-]5-7b|llava-7b", "llava-1.5-7b"),
    (r"llava-?v?1[.-]5-13b", "llava-1.5-13b"),
    (r"llava-?onevision.*7b", "llava-onevision-7b"),
    (r"cogvlm2", "cogvlm2-19b"),
    (r"cogvlm", "cogvlm-17b"),
    (r"llama-?3[.-]2-11b-vision", "llama-3.2-11b-vision"),
)


def preset_of(name: str) -> str | None:
    """The preset that a name in a log means, or None."""
    plain = name.lower().replace("_", "-")
    for pattern, preset in _SPELLINGS:
        if re.search(pattern, plain):
            return preset
    return find_preset(name)
