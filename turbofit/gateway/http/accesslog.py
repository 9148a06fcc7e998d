"""The record of each request: JSON lines, on stderr or in a file with a maximum size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import UsageError
from turbofit.core.process.log_queue import FileLog
from turbofit.core.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.json_types import Document

    Log = Callable[[dict[str, Any]], None]

_LOG_CAP: Final = 64 * MIB
#: After a line of which the disk took the first half alone, perhaps.
_LOST: Final = '\n{"lost": "lines are missing here: the disk was full or slow"}\n'


class AccessLog(FileLog):
    """JSON lines in a file; where lines are lost, a line says so."""

    def __init__(self, path: Path, *, cap: int = _LOG_CAP) -> None:
        super().__init__(path, cap, _LOST)

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
    sys.stderr.write(_line(record))
    sys.stderr.flush()


def _line(record: Document) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
