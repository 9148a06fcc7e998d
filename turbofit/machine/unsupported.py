"""Cards that people name in a SPEC and that LMDeploy does not serve on: the answer, by name."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from turbofit.core.presets import converted, load_yaml, presets_dir
from turbofit.core.struct import Struct

__all__ = ["UnsupportedCard", "unsupported_card"]

_FILE: Final = "unsupported.yaml"


class UnsupportedCard(Struct, forbid_unknown_fields=True):
    """One row of `presets/gpus/unsupported.yaml`.

    ``names`` are regular expressions of the whole name, in lower case, letters and digits alone.
    """

    names: tuple[str, ...]
    card: str
    why: str
    instead: str


def unsupported_card(name: str) -> UnsupportedCard | None:
    """The first row that a typed name belongs to; None where there is none."""
    wanted = "".join(c for c in name.lower() if c.isalnum())
    for row in _rows():
        if any(re.fullmatch(pattern, wanted) for pattern in row.names):
            return row
    return None


@cache
def _rows() -> tuple[UnsupportedCard, ...]:
    path = presets_dir() / "gpus" / _FILE
    return converted(load_yaml(path).get("cards"), tuple[UnsupportedCard, ...], path)
