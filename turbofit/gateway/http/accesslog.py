"""The record of each request: JSON lines, on stderr or in a file with a maximum size.

A trace, for `turbofit bench --trace`, has nothing of a client but the times and sizes of requests.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import UsageError
from turbofit.core.process.log_queue import FileLog
from turbofit.core.units import MIB
from turbofit.gateway.media.pictures import Picture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Document
    from turbofit.gateway.http.prepare import Preparation
    from turbofit.gateway.http.request_context import ForwardOutcome

    Log = Callable[[dict[str, Any]], None]

_LOG_CAP: Final = 64 * MIB
#: After a line of which the disk took the first half alone, perhaps.
_LOST: Final = '\n{"lost": "lines are missing here: the disk was full or slow"}\n'
#: Bytes of a trace: enough for a few million requests.
_TRACE_CAP: Final = 256 * MIB
_USAGE: Final = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,9})')
_TEXTS: Final = ("content", "text", "prompt", "system", "input")
_DEEPEST: Final = 8


class AccessLog(FileLog):
    """JSON lines in a file; where lines are lost, a line says so."""

    def __init__(self, path: Path, *, cap: int = _LOG_CAP, notices: bool = True) -> None:
        super().__init__(path, cap, _LOST if notices else "")

    def __call__(self, record: Document) -> None:
        self.put(_line(record))


def access_log(where: str) -> Log | None:
    """The log for the value of an option: a file, ``-`` for stderr, or ``none``."""
    if where == "none":
        return None
    if where == "-":
        return _to_stderr
    return _opened(where, "--access-log")


def _opened(path: str, option: str, *, cap: int = _LOG_CAP, notices: bool = True) -> AccessLog:
    try:
        return AccessLog(Path(path), cap=cap, notices=notices)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}", hint=f"choose another {option}"
        ) from None


def _to_stderr(record: Document) -> None:
    sys.stderr.write(_line(record))
    sys.stderr.flush()


def _line(record: Document) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


class TraceRecorder:
    """Appends a line for each answered request to a file."""

    def __init__(self, path: str) -> None:
        self._log = _opened(path, "--record-trace", cap=_TRACE_CAP, notices=False)
        self._first: float | None = None

    def __call__(self, came: float, size: Document, outcome: ForwardOutcome) -> None:
        if outcome.status != 200 or outcome.broken:
            return
        if self._first is None:
            self._first = came
        self._log(
            {
                "at": round(max(0.0, came - self._first), 4),
                "output_tokens": answer_tokens(outcome.tail, outcome.events),
                **size,
            }
        )

    def close(self) -> None:
        self._log.close()


def request_size(prepared: Preparation) -> Document:
    """The size of a request: bytes of its text, and width and height of each image in pixels."""
    texts = (prepared.parsed.body.get(name) for name in ("messages", *_TEXTS))
    return {
        "prompt_bytes": sum(_text_bytes(text, 0) for text in texts),
        "images": [medium.size for medium in prepared.media if isinstance(medium, Picture)],
    }


def answer_tokens(tail: bytes, events: int) -> int:
    """Tokens of an answer, from its usage, else its events (too few: an event may hold several)."""
    counts: Sequence[bytes] = _USAGE.findall(tail)
    return int(counts[-1]) if counts else events


def _text_bytes(value: Any, depth: int) -> int:
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if depth > _DEEPEST:
        return 0
    if isinstance(value, list):
        return sum(_text_bytes(part, depth + 1) for part in value)
    if isinstance(value, dict):
        return sum(_text_bytes(value.get(name), depth + 1) for name in _TEXTS)
    return 0
