"""The record of each request: JSON lines, on stderr or in a file with a maximum size."""

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

_LOG_CAP: Final = 64 * MIB


class AccessLog(CappedLog):
    """JSON lines in a file; if lines were lost, a line says how many."""

    def __init__(self, path: Path, *, cap: int = _LOG_CAP) -> None:
        def missing(lines: int) -> bytes:
            return _line({"time": round(time.time(), 3), "dropped_lines": lines})

        super().__init__(path, cap, missing)

    def __call__(self, record: Document) -> None:
        self.put(_line(record))


def access_log(where: str) -> Log | None:
    """The log for the value of an option: a file, ``-`` for stderr, or ``none``."""
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


def _to_stderr(record: Document) -> None:
    sys.stderr.write(_line(record).decode())
    sys.stderr.flush()


def _line(record: Document) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
