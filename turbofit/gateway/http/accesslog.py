"""The record of each request: JSON lines, on stderr or in a file that never grows past its cap."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from turbofit.core.errors import UsageError
from turbofit.core.process.files import rotate
from turbofit.core.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.json_types import Document

    Log = Callable[[dict[str, Any]], None]

__all__ = ["AccessLog", "access_log", "trace_log"]

_LOG_CAP: Final = 64 * MIB
#: A few million requests.
_TRACE_CAP: Final = 256 * MIB


class AccessLog:
    """JSON lines in a file that begins anew at 64 MiB; the one before it is kept as ``.1``."""

    def __init__(self, path: Path, *, cap: int = _LOG_CAP) -> None:
        self._path, self._cap = path, cap
        self._file: BinaryIO = path.open("ab")
        self._lock = threading.Lock()

    def __call__(self, record: Document) -> None:
        """Keep one record; a full disk costs the log, never an answer."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            with self._lock:
                if self._file.tell() + len(line) > self._cap:
                    self._file = rotate(self._path, self._file)
                self._file.write(line)
                self._file.flush()
        except (OSError, ValueError):
            return

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:
            return


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
        return AccessLog(Path(path), cap=_TRACE_CAP)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}",
            hint="choose another --record-trace",
        ) from None


def _to_stderr(record: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(record, ensure_ascii=False) + "\n")
    sys.stderr.flush()
