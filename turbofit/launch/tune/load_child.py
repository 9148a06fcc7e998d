"""The load of a trial, in a process of its own: `turbofit bench`.

Beside the gateway, in its process, the load would wait for the gateway's interpreter lock, and
measure that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.process.variable_names import without_options
from turbofit.load.result import LoadResult

if TYPE_CHECKING:
    from turbofit.load.spec import LoadSpec

__all__ = ["LoadChild"]

_PATIENCE: Final = 10.0
_SHOWN: Final = 300


class LoadChild:
    """One load.

    Args:
        url: of the gateway.
        key: its key.
        spec: what is sent.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, url: str, key: str, spec: LoadSpec) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "turbofit", "bench", url, "--json", *spec.option_arguments()],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**without_options(os.environ), "TURBOFIT_API_KEY": key},
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        )  # fmt: skip
        self._said, self._erred = b"", b""

    def wait(self) -> None:
        """Wait for its end; for one thread."""
        self._said, self._erred = self._process.communicate()

    def end(self) -> None:
        """Stop it where it runs, from any thread, and wait for it."""
        for number in (signal.SIGINT, signal.SIGKILL):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE)
                return

    @property
    def result(self) -> LoadResult | None:
        """What it measured; None where it measured nothing."""
        try:
            return msgspec.json.decode(self._said, type=LoadResult)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    @property
    def why(self) -> str:
        """Why it measured nothing."""
        try:
            error: Any = msgspec.json.decode(self._said)["error"]["message"]
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
            error = self._erred.decode(errors="replace").strip()
        return str(error)[-_SHOWN:] or f"the load ended with {self._process.returncode}"
