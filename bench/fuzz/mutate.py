"""Bends the JSON inside an input; bytes that are no JSON are left to libFuzzer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["bent"]

_JSON: Final = re.compile(rb"[\[{].*[\]}]", re.DOTALL)
_VALUES: Final = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 127, 255, 4096, 65536, 2**31, 2**53, 2**63, 2**64,
    10**30,
    0.5, -0.0, 1e308, 1e-308, "", "a", "NA", "\ud800", "\x00", "é", "auto", "none", "0", "1e9",
    "x" * 300,
    [], {}, [[]], [0], [1, 2], {"a": 1}, [None],
)  # fmt: skip


def bent(data: bytes, seed: int) -> bytes | None:
    """The same input with some nodes of its JSON changed; None where it holds none."""
    match = _JSON.search(data)
    if match is None:
        return None
    rng = random.Random(seed)
    try:
        holder = [json.loads(match[0])]
        for _ in range(rng.choice((1, 1, 2, 4))):
            _bend(holder, rng)
        text = json.dumps(holder[0], separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return None
    return data[: match.start()] + text + data[match.end() :]


def _bend(root: list[Any], rng: random.Random) -> None:
    nodes = list(_nodes(root))
    holder, key = rng.choice(nodes)
    what = rng.randrange(6)
    if what == 0 and holder is not root:
        del holder[key]
    elif what == 1:
        other, place = rng.choice(nodes)
        holder[key] = json.loads(json.dumps(other[place]))
    elif what == 2 and isinstance(holder, list):
        holder[key:key] = [holder[key]] * rng.choice((1, 2, 40))
    elif what == 3:
        holder[key] = [holder[key]]
    elif what == 4 and isinstance(holder[key], int):
        holder[key] = holder[key] + rng.choice((-1, 1)) if rng.random() < 0.5 else -holder[key]
    else:
        holder[key] = rng.choice(_VALUES)


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _nodes(value[key])
