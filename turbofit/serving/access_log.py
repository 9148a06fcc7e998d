"""The access log of a gateway: a line of JSON for each request, in a file or on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.struct import Document
from turbofit.core.units import MIB
from turbofit.gateway.http.asgi_app import Log
from turbofit.serving.process.log_queue import FileLog

_LOG_CAP: Final = 64 * MIB
#: The text begins with a line end, since the line before it may be incomplete on the disk.
_LOST: Final = '\n{"lost": "lines are missing here: the disk was full or slow"}\n'


class AccessLog(FileLog):
    """A log file with a line of JSON for each request, and a line where lines were lost."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _LOG_CAP, _LOST)

    def __call__(self, record: Document) -> None:
        self.put(_entry(record))


def access_log(where: str) -> Log | None:
    """Return the log that the option ``--access-log`` names, or None for ``none``.

    ``-`` is stderr. Any other text is the path of a file, and this function opens the file.

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


def _to_stderr(record: Document) -> None:
    sys.stderr.write(_entry(record))
    sys.stderr.flush()


def _entry(record: Document) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
