"""One line of the results."""

from __future__ import annotations

from typing import Literal, NamedTuple

Fate = Literal["survived", "died", "refused", "hung"]


class Row(NamedTuple):
    """What one setting did on one pair.

    ``fate``: ``refused`` is a start that did not come about, ``died`` a server that had started.
    ``tokens`` is the KV cache, None where none was made.
    """

    pair: str
    who: str
    settings: str
    tokens: int | None
    fate: Fate
    of: str
    note: str = ""
