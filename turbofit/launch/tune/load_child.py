"""The load of a trial, in a process of its own: `turbofit bench`.

Beside the gateway, in its process, it would wait for the interpreter with it and measure that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.process.variable_names import without_options
from turbofit.load.result import LoadResult

if TYPE_CHECKING:
    from collections.abc import Callable

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
        on_end: called in another thread when it has ended.
    """

    def __init__(self, url: str, key: str, spec: LoadSpec, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._process = subprocess.Popen(
            [sys.executable, "-m", "turbofit", "bench", url, "--json", *spec.option_arguments()],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**without_options(os.environ), "TURBOFIT_API_KEY": key},
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        )  # fmt: skip
        self._said, self._erred = b"", b""
        self._thread = threading.Thread(target=self._wait, name="load", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        self._said, self._erred = self._process.communicate()
        self._on_end()

    def end(self) -> None:
        """Stop it where it runs, and wait for it."""
        for number in (signal.SIGINT, signal.SIGKILL):
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    self._process.send_signal(number)
            self._thread.join(_PATIENCE)
            if not self._thread.is_alive():
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
