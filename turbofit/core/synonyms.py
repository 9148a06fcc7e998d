"""What other programs call an option or a command, and which known name a misspelt one is.

``presets/engines/synonyms.yaml`` has the names; it is read for an unknown one alone.
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

#: Names less alike are no misspellings of each other.
_ALIKE: Final = 0.8
#: What stands around a word that was copied.
QUOTES: Final = "\"'`\u2018\u2019\u201c\u201d\u201e\u300c\u300d"


class Synonym(Struct, forbid_unknown_fields=True):
    """A name of other programs: see the file for the fields."""

    of: str
    to: str = ""
    say: str = ""
    take: bool = False
    flag: bool = False
    values: dict[str, str] = msgspec.field(default_factory=dict)

    def here(self, value: str | None, form: str) -> str:
        """Whose name it is, and what to write instead.

        ``value`` was typed behind the name. ``form`` is how an option and its value are written:
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
        """A value of that name as it is called here; empty where nothing is."""
        if not self.values:
            return "" if self.flag else value
        matches = ((re.fullmatch(pattern, value), to) for pattern, to in self.values.items())
        return next((match.expand(to) for match, to in matches if match), "")


class _Tables(Struct):
    """The file: see it for the fields. A row's names stand beside each other."""

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
    """A name or a machine without quotes, and without the letters of a Chinese input method."""
    text = text.strip().strip(QUOTES)
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text).strip()
    for pattern, word in _tables().letters.items():
        text = re.sub(pattern, word, text)
    return text


def synonym(name: str) -> Synonym | None:
    """The row of an option, a variable, a profile's key or a keyword; None for a name of nobody."""
    return _tables().options.get(name.lstrip("-").replace("_", "-").lower())


def command_synonym(name: str) -> str | None:
    """What does here what a command of other programs does; None for a command of nobody."""
    return _tables().commands.get(name.lower())


def near(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that a misspelt one may mean, nearest first.

    Else those of the same letters, or those that it begins with.
    """
    from difflib import get_close_matches

    known = list(known)
    alike = get_close_matches(name, known, n=count, cutoff=_ALIKE)
    letters = [word for word in known if sorted(word) == sorted(name)]
    return alike or (letters or [word for word in known if name.startswith(f"{word}-")])[:count]


def guess(name: str, known: Iterable[str], count: int = 1, of: str = "") -> str:
    """``did you mean …? `` with the nearest names, each behind ``of``; empty where none is near."""
    alike = [f"{of}{other}" for other in near(name, known, count)]
    return f"did you mean {' or '.join(alike)}? " if alike else ""


def meant(word: str, known: Iterable[str], form: str = "", value: str | None = None) -> str:
    """The hint for a word that nothing here has: its name here, the nearest ones, or all.

    ``form`` and ``value`` are as of :meth:`Synonym.here`; no form: it is no other program's.
    """
    if form and (known_elsewhere := synonym(word)):
        return known_elsewhere.here(value, form)
    known = list(dict.fromkeys(known))
    return guess(word, known, 3).rstrip() or f"it knows {', '.join(known)}"
