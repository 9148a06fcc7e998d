"""The load of a trial, in a process of its own, which tells how far it is.

Beside the gateway, in its process, the load would wait for the gateway's interpreter lock, and
measure that.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from multiprocessing import get_context, resource_tracker
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import TurbofitError
from turbofit.core.process.progress import Step, tell
from turbofit.load.result import LoadResult

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from turbofit.load.spec import LoadSpec

_PATIENCE: Final = 10.0
#: Characters of what a load that broke says.
_LONGEST: Final = 300


class LoadChild:
    """One load at a gateway; ``result`` is what it measured, None where that is nothing.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, url: str, key: str, spec: LoadSpec) -> None:
        context = get_context("spawn")
        self._told, told_by_child = context.Pipe(duplex=False)
        self.result: LoadResult | None = None
        self._error = ""
        self._process = context.Process(
            target=_drive, args=(told_by_child, url, key, spec), daemon=True
        )
        # A signal waits until the child can take it. The tracker's own start would unblock it.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        told_by_child.close()

    def look(self) -> bool:
        """Tell how far it is; whether it has ended."""
        ended = not self._process.is_alive()
        with suppress(EOFError, OSError):
            while self._told.poll():
                told = self._told.recv()
                if isinstance(told, Step):
                    tell(told)
                elif isinstance(told, LoadResult):
                    self.result = told
                else:
                    self._error = told
        return ended

    def interrupt(self) -> bool:
        """Have it end with what it has measured; whether it runs."""
        running = self._process.is_alive()
        if running and self._process.pid is not None:
            os.kill(self._process.pid, signal.SIGINT)
        return running

    def end(self) -> None:
        """Stop it where it runs, and take what it has measured."""
        self.interrupt()
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join(_PATIENCE)
        self.look()

    @property
    def why(self) -> str:
        return self._error or f"the load ended with {self._process.exitcode}"


def _drive(told: Connection, url: str, key: str, spec: LoadSpec) -> None:
    """Drive the load: a step each second, and the result or the error as the last."""
    from turbofit.load.bench import bench

    with suppress(KeyboardInterrupt):
        os.setsid()  # Ctrl-C reaches turbofit alone, which ends this process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            told.send(bench(url, spec, key=key or None, tick=lambda run: told.send(run.step())))
        except TurbofitError as exc:
            told.send(exc.message)
        except Exception as exc:  # noqa: BLE001 - the trial says why; others go on
            told.send(f"{type(exc).__name__}: {exc}"[:_LONGEST])
