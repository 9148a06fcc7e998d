"""The record of each request: JSON lines, on stderr or in a file that never grows past its cap."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import UsageError
from turbofit.core.process.log_queue import CappedLog
from turbofit.core.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.json_types import Document

    Log = Callable[[dict[str, Any]], None]

__all__ = ["AccessLog", "access_log", "trace_log"]

_LOG_CAP: Final = 64 * MIB
#: A few million requests.
_TRACE_CAP: Final = 256 * MIB


class AccessLog(CappedLog):
    """JSON lines in a file; where some are missing, one says how many."""

    def __init__(self, path: Path, *, cap: int = _LOG_CAP, notices: bool = True) -> None:
        super().__init__(path, cap, _missing if notices else None)

    def __call__(self, record: Document) -> None:
        """Keep one record."""
        self.put(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def access_log(where: str) -> Log | None:
    """Where records of requests go.

    Args:
        where: a file, ``-`` for stderr, or ``none``.

    Raises:
        UsageError: the file cannot be written.
    """
    if where == "none":
        return None
    if where == "-":
        return _to_stderr
    try:
        return AccessLog(Path(where))
    except OSError as exc:
        raise UsageError(
            f"{where} cannot be written: {exc.strerror or exc}", hint="choose another --access-log"
        ) from None


def trace_log(path: str) -> AccessLog:
    """Where a trace of requests goes; what the file holds stays.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        return AccessLog(Path(path), cap=_TRACE_CAP, notices=False)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}",
            hint="choose another --record-trace",
        ) from None


def _to_stderr(record: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(record, ensure_ascii=False) + "\n")
    sys.stderr.flush()


def _missing(lines: int) -> bytes:
    return json.dumps({"time": round(time.time(), 3), "dropped_lines": lines}).encode() + b"\n"
