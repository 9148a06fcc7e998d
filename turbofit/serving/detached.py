"""Starts a server in the background, waits until it is open, and leaves it running."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.process.child import child
from turbofit.serving.runs import state_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


#: This variable is set for a server in the background, which must not start another one.
DETACHED: Final = "_TURBOFIT_DETACHED"
#: Lines of its log that are shown if it does not open.
_TOLD: Final = 20


class DetachedServer(NamedTuple):
    """A started server; if it ended early, ``url`` is empty and ``exit_code`` is set."""

    pid: int
    url: str
    log: Path
    exit_code: int | None

    def last_lines(self) -> list[str]:
        with self.log.open(encoding="utf-8", errors="replace") as file:
            return list(deque((line.rstrip("\n") for line in file), maxlen=_TOLD))


def serve_detached(words: Sequence[str]) -> DetachedServer:
    """Start ``turbofit serve`` with these words in a session of its own; return once it is open.

    Its output goes to a log in the state folder. Ctrl-C during the wait ends it, too.

    Raises:
        LaunchError: the state folder cannot be written.
    """
    log = state_folder("detached", "serve") / "serve.log"
    interrupted: list[int] = []
    # A KeyboardInterrupt between the start and the wait would leave an unattended server.
    usual = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        with log.open("wb") as file:
            argv = [sys.executable, "-m", "turbofit", "serve", *words]
            server = child(argv, {**os.environ, DETACHED: "1"}, stderr=file, outlives=True)
        assert server.stdout is not None
        try:
            signal.signal(signal.SIGINT, usual)
            if interrupted:
                raise KeyboardInterrupt
            with server.stdout:
                url = server.stdout.readline().decode("utf-8", "replace").strip()
        except BaseException:
            server.send_signal(signal.SIGTERM)
            server.wait()
            raise
    finally:
        signal.signal(signal.SIGINT, usual)
    return DetachedServer(server.pid, url, log, None if url else server.wait())
