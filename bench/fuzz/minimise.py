"""The inputs that reach lines of turbofit which no shorter input reaches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final

from bench.fuzz.check import check

__all__ = ["minimised"]

_OURS: Final = str(Path(__file__).resolve().parents[2] / "turbofit")
#: Bytes of a target that are kept at most, in base64 a third more.
_MOST: Final = 18_000

_Arcs = set[tuple[str, int, int]]


def minimised(
    one: Callable[[bytes], None], seeds: Iterable[bytes], data: Collection[bytes]
) -> list[bytes]:
    """Those of ``data`` that reach a step from a line to a line that nothing before them reaches.

    Short ones come first, and seeds before all others; what ends otherwise than it may is left out.
    """
    covered: _Arcs = set()
    for seed in seeds:
        covered |= _arcs(one, seed) or set()
    kept: list[bytes] = []
    size = 0
    for item in sorted(data, key=lambda item: (len(item), item)):
        arcs = _arcs(one, item)
        if arcs is not None and not arcs <= covered and size + len(item) <= _MOST:
            covered |= arcs
            kept.append(item)
            size += len(item)
    return kept


def _arcs(one: Callable[[bytes], None], data: bytes) -> _Arcs | None:
    """Steps between lines of turbofit; None where the input is a finding."""
    found: _Arcs = set()

    def called(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(_OURS):
            return None
        last = 0

        def stepped(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                found.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return stepped

        return stepped

    def traced(data: bytes) -> None:
        sys.settrace(called)
        try:
            one(data)
        finally:
            sys.settrace(None)

    return found if check(traced, data, 60.0) is None else None
