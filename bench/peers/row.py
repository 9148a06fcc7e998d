"""One line of the results."""

from __future__ import annotations

from typing import Literal, NamedTuple

Fate = Literal["survived", "died", "refused", "hung", "stalled"]


class Row(NamedTuple):
    """What one setting did on one pair.

    ``fate``: ``refused`` is a start that did not come about, ``died`` a server that had started,
    ``stalled`` one that the pretend machine could not take further: nothing is known of it.
    ``tokens`` is the KV cache, None where none was made; ``host`` bytes of the process tree at its
    peak; ``ready`` seconds until the engine was up, on the pretend machine.
    """

    pair: str
    who: str
    settings: str
    tokens: int | None
    fate: Fate
    of: str
    host: int
    pinned: int | None
    ready: float | None
    note: str = ""
