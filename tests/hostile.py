"""Bytes that nobody would write: inputs that are kept, and what becomes of them when they are bent.

`fixtures/hostile` has a text file a reader, one input a line in base64, those that once broke
something first, each with a note. They were found with coverage (atheris, at commit 635f43ad).
"""

from __future__ import annotations

import json
import random
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.waiting import endless_ends
from tests.sweep import part

_FOLDER = Path(__file__).parent / "fixtures" / "hostile"
_JSON = re.compile(rb"[\[{].*[\]}]", re.DOTALL)
_VALUES = (
    None, True, 0, 1, -1, 3, 64, 255, 65536, 2**31, 2**53, 2**64, 10**30, 0.5, -0.0, 1e308, "",
    "NA", "\ud800", "\x00", "auto", "1e9", "x" * 300, [], {}, [[]], [1, 2], {"a": 1}, [None],
)  # fmt: skip
_BYTES = st.binary(max_size=6) | st.sampled_from(
    [b"\0", b"\n", b"\xff\xfe", b"1e999", b"-1", b"|~|"]
)


def hostile(
    name: str, examples: int = 150
) -> Callable[[Callable[[bytes], None]], Callable[[], None]]:
    """A test that gives a function all that is kept under a name, and bent forms of that.

    The function returns or fails; a read that does not end is ended.
    """

    def decorate(read: Callable[[bytes], None]) -> Callable[[], None]:
        kept = _kept(name)

        @settings(max_examples=part(examples, 5), suppress_health_check=list(HealthCheck))
        @given(_bent(kept))
        def drawn(data: bytes) -> None:
            with endless_ends():
                read(data)

        @pytest.mark.slow
        @pytest.mark.filterwarnings("ignore::Warning:PIL")
        def test() -> None:
            for data in kept:
                with endless_ends():
                    read(data)
            drawn()

        return test

    return decorate


def _kept(name: str) -> list[bytes]:
    lines = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [b64decode(line, validate=True) for line in lines if not line.startswith("#")]


@st.composite
def _bent(draw: st.DrawFn, kept: list[bytes]) -> bytes:
    """An input with nodes of its JSON changed, bytes replaced, or a part of another one in it."""
    data = draw(st.sampled_from(kept))
    for _ in range(draw(st.integers(1, 3))):
        seed = draw(st.none() | st.integers(0, 2**16))
        bent = None if seed is None else _json_bent(data, seed)
        if bent is None:
            begin = draw(st.integers(0, len(data)))
            end = draw(st.integers(begin, min(len(data), begin + 40)))
            other = draw(st.sampled_from(kept))
            place = draw(st.integers(0, len(other)))
            bent = data[:begin] + draw(_BYTES | st.just(other[place : place + 40])) + data[end:]
        data = bent
    return data


def _json_bent(data: bytes, seed: int) -> bytes | None:
    """The same with some nodes of its JSON changed; None where it holds none."""
    match = _JSON.search(data)
    if match is None:
        return None
    chance = random.Random(seed)
    try:
        root = [json.loads(match[0])]
        for _ in range(chance.choice((1, 1, 2, 4))):
            nodes = list(_nodes(root))
            (holder, key), (other, place) = chance.choice(nodes), chance.choice(nodes)
            what = chance.randrange(5)
            if what == 0 and holder is not root:
                del holder[key]
            elif what == 1:
                holder[key] = json.loads(json.dumps(other[place]))
            elif what == 2 and isinstance(holder, list):
                holder[key:key] = [holder[key]] * chance.choice((1, 2, 40))
            elif what == 3:
                holder[key] = [holder[key]]
            else:
                holder[key] = deepcopy(chance.choice(_VALUES))  # the next change may be in it
        text = json.dumps(root[0], separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return None
    return data[: match.start()] + text + data[match.end() :]


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _nodes(value[key])
