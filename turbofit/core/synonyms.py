"""What other programs call an option or a command, and which known name a misspelt one is.

``presets/engines/synonyms.yaml`` has the names; it is read for an unknown one alone.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from turbofit.core.presets import converted, load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.core.units import MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Synonym", "command_synonym", "near", "synonym"]

#: Names less alike are no misspellings of each other.
_ALIKE: Final = 0.8


class Synonym(Struct, forbid_unknown_fields=True):
    """A name of other programs: see the file for the fields."""

    of: str
    to: str = ""
    say: str = ""
    take: bool = False
    values: dict[str, str] = msgspec.field(default_factory=dict)
    kind: Literal["", "share", "count", "pixels", "flag"] = ""

    def here(
        self, value: str | None, form: str, card: Callable[[], int | None] = lambda: None
    ) -> str:
        """Whose name it is, and what to write instead.

        Args:
            value: what was typed behind the name; None where nothing was.
            form: how an option and its value are written: ``--{option} {value}``,
                ``{field}={value}``.
            card: bytes of the smallest GPU that is asked about; None where that is not known.
        """
        said = self.say.replace("{value}", value or "N")
        if self.to:
            option, value, note = self._translated(value or "", card)
            field = option.replace("-", "_").lower()
            written = form.format(option=option, field=field, variable=field.upper(), value=value)
            said = written.rstrip(" =:") + note + (f" ({said})" if said else "")
        return f"an option of {self.of}; here: {said}"

    def _translated(self, value: str, card: Callable[[], int | None]) -> tuple[str, str, str]:
        """The option, its value, empty where there is none, and how that was found."""
        if self.values or self.kind == "flag":
            return self.to, self.values.get(value, ""), ""
        if self.kind == "count":
            count = re.search(r"(?:image\W+|^)(\d+)", value)
            return self.to, count[1] if count else "", ""
        if self.kind == "pixels":
            limit = re.search(r"(max_pixels|max_dynamic_patch)\W+(\d+)", value)
            return (limit[1].replace("_", "-"), limit[2], "") if limit else (self.to, "", "")
        if self.kind != "share":
            return self.to, value, ""
        match = re.fullmatch(r"(\d*\.?\d+)(%?)", value)
        share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
        total = card()
        if not 0 < share <= 1 or total is None:
            return self.to, "BYTES", ", of a card of 24 GiB 21.6GiB for a share of 0.9"
        size = f"{int(share * total) // MIB}MiB"
        return self.to, size, f", which is {share:g} of {format_bytes(total)}"


@cache
def _tables() -> tuple[dict[str, Synonym], dict[str, str]]:
    path = preset_path("engines", "synonyms")
    data = load_yaml(path)
    options = converted(data.get("options"), dict[str, Synonym], path)
    return options, converted(data.get("commands"), dict[str, str], path)


def synonym(name: str) -> Synonym | None:
    """Of an option, a variable's or a profile's key, or a keyword; None for a name of nobody."""
    return _tables()[0].get(name.lstrip("-").replace("_", "-").lower())


def command_synonym(name: str) -> str | None:
    """What does here what a command of other programs does; None for a command of nobody."""
    return _tables()[1].get(name.lower())


def near(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that a misspelt one may mean, nearest first."""
    from difflib import get_close_matches

    return get_close_matches(name, list(known), n=count, cutoff=_ALIKE)
