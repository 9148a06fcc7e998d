"""The known names near a misspelt one, and what options of vLLM are called here."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from typing import Final

from turbofit.core.presets import load_yaml, preset_path

#: The least similarity of two names that counts as a misspelling.
_ALIKE: Final = 0.8
#: Quotes that are copied together with a word.
_QUOTES: Final = "\"'`\u2018\u2019\u201c\u201d\u201e\u300c\u300d"


def plain(text: str) -> str:
    """A name or a machine without quotes, and with full-width characters made ASCII."""
    return unicodedata.normalize("NFKC", text.strip().strip(_QUOTES)).strip()


@cache
def _vllm() -> dict[str, dict[str, str]]:
    options: dict[str, dict[str, str]] = load_yaml(preset_path("engines", "vllm-options"))
    return options


def of_vllm(name: str, spelled: Callable[[str], str]) -> str:
    """What turbofit has for an option of vLLM; empty for a name that vLLM does not have.

    ``spelled`` writes the name of turbofit's option.
    """
    row = _vllm().get(name.lstrip("-").replace("_", "-").lower())
    if row is None:
        return ""
    words = [spelled(row["here"]) if "here" in row else "", row.get("say", "")]
    return f"an option of vLLM; here: {', '.join(filter(None, words))}"


def near(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that a misspelt name may mean, the nearest first.

    If none is similar, those with the same letters, or those that begin with it.
    """
    from difflib import get_close_matches

    known = list(known)
    alike = get_close_matches(name, known, n=count, cutoff=_ALIKE)
    letters = [word for word in known if sorted(word) == sorted(name)]
    return alike or (letters or [word for word in known if name.startswith(f"{word}-")])[:count]


def guess(name: str, known: Iterable[str], count: int = 1) -> str:
    """``did you mean …?`` with the nearest names; empty if none is near."""
    alike = near(name, known, count)
    return f"did you mean {' or '.join(alike)}?" if alike else ""


def meant(word: str, known: Iterable[str]) -> str:
    """The hint for an unknown word: the nearest known names, or all."""
    known = list(dict.fromkeys(known))
    return guess(word, known, 3) or f"it knows {', '.join(known)}"
