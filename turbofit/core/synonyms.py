"""Names of options and commands in other programs, and the known names near a misspelt one.

The names are in ``presets/engines/synonyms.yaml``, which is read only for an unknown name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Final

import msgspec

from turbofit.core.presets import converted, load_yaml, preset_path
from turbofit.core.struct import Struct

#: The least similarity of two names that counts as a misspelling.
_ALIKE: Final = 0.8
#: Quotes that are copied together with a word.
QUOTES: Final = "\"'`\u2018\u2019\u201c\u201d\u201e\u300c\u300d"


class Synonym(Struct, forbid_unknown_fields=True):
    """A name from other programs; the file describes the fields."""

    of: str
    to: str = ""
    say: str = ""
    take: bool = False
    flag: bool = False
    values: dict[str, str] = msgspec.field(default_factory=dict)

    def here(self, value: str | None, form: str) -> str:
        """Say which program has the name, and what to write in turbofit.

        ``value`` stood after the name. ``form`` is how an option and its value are written:
        ``--{option} {value}``, ``{field}={value}``.
        """
        words = self.say.replace("{value}", value or "N")
        if self.to:
            field, value = self.to.replace("-", "_").lower(), self.value_here(value or "")
            names = {"option": self.to.lower(), "field": field, "variable": field.upper()}
            written = form.format(**names, value=value).rstrip(" =:")
            words = written + (f" ({words})" if words else "")
        return f"an option of {self.of}; here: {words}"

    def value_here(self, value: str) -> str:
        """The same value in turbofit's words; empty if turbofit has no such value."""
        if not self.values:
            return "" if self.flag else value
        matches = ((re.fullmatch(pattern, value), to) for pattern, to in self.values.items())
        return next((match.expand(to) for match, to in matches if match), "")


class _Tables(Struct):
    """The whole file, which describes its fields. One row may have several names."""

    options: dict[str, Synonym]
    commands: dict[str, str]
    letters: dict[str, str]


@cache
def _tables() -> _Tables:
    path = preset_path("engines", "synonyms")
    rows = converted(load_yaml(path), _Tables, path)
    return _Tables(
        options={name: row for names, row in rows.options.items() for name in names.split()},
        commands={name: row for names, row in rows.commands.items() for name in names.split()},
        letters=rows.letters,
    )


def plain(text: str) -> str:
    """A name or a machine without quotes, and with Chinese full-width characters made ASCII."""
    text = text.strip().strip(QUOTES)
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text).strip()
    for pattern, word in _tables().letters.items():
        text = re.sub(pattern, word, text)
    return text


def synonym(name: str) -> Synonym | None:
    """The row of an option, a variable, a profile's key or a keyword; None for an unknown name."""
    return _tables().options.get(name.lstrip("-").replace("_", "-").lower())


def command_synonym(name: str) -> str | None:
    """Turbofit's counterpart of another program's command; None for an unknown command."""
    return _tables().commands.get(name.lower())


def near(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that a misspelt name may mean, the nearest first.

    If none is similar, those with the same letters, or those that begin with it.
    """
    from difflib import get_close_matches

    known = list(known)
    alike = get_close_matches(name, known, n=count, cutoff=_ALIKE)
    letters = [word for word in known if sorted(word) == sorted(name)]
    return alike or (letters or [word for word in known if name.startswith(f"{word}-")])[:count]


def guess(name: str, known: Iterable[str], count: int = 1, of: str = "") -> str:
    """``did you mean …? `` with the nearest names, each after ``of``; empty if none is near."""
    alike = [f"{of}{other}" for other in near(name, known, count)]
    return f"did you mean {' or '.join(alike)}? " if alike else ""


def meant(word: str, known: Iterable[str], form: str = "", value: str | None = None) -> str:
    """The hint for an unknown word: its name in turbofit, the nearest known names, or all.

    ``form`` and ``value`` are those of :meth:`Synonym.here`; no ``form``: only known names count.
    """
    if form and (known_elsewhere := synonym(word)):
        return known_elsewhere.here(value, form)
    known = list(dict.fromkeys(known))
    return guess(word, known, 3).rstrip() or f"it knows {', '.join(known)}"
