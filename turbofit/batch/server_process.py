"""``turbofit serve`` for one batch, in a process that ends with this one."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError, TurbofitError, error_from
from turbofit.core.process.variable_names import without_options
from turbofit.launch.engine import guard
from turbofit.launch.engine.launches import free_ports
from turbofit.launch.serve.runs import recorded_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.limits import Limits
    from turbofit.launch.serve.record import RunRecord

__all__ = ["ServerProcess"]

SERVE: Final = (sys.executable, "-m", "turbofit", "serve")
#: Deaths of the whole server without an answer in between.
_MOST_DEATHS: Final = 3
_LAST_LINES: Final = 20
#: After its signal it drains, checks that the memory is back, and is killed then.
_END_SECONDS: Final = 90.0


class ServerProcess:
    """One server.

    Args:
        options: of ``turbofit serve``, the model first.
        say: takes its lines of progress.
    """

    def __init__(self, options: Sequence[str], say: Callable[[str], None]) -> None:
        self._options, self._say = tuple(options), say
        self.key = secrets.token_hex(16)
        self.url = ""
        self._process: asyncio.subprocess.Process | None = None
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._readers: list[asyncio.Task[None]] = []
        self._opened = asyncio.Event()
        self._ending = False

    async def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
            TurbofitError: why it does not.
        """
        port = free_ports(1)[0]
        command = [*SERVE, *self._options, "--port", str(port), "--access-log", "none"]
        self._opened.clear()
        self._last.clear()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(Path(guard.__file__)), str(os.getpid()), *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**without_options(os.environ), "TURBOFIT_API_KEY": self.key},
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
            limit=1 << 20,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            asyncio.ensure_future(self._read_urls(self._process.stdout)),
            asyncio.ensure_future(self._read_lines(self._process.stderr)),
        ]
        opened = asyncio.ensure_future(self._opened.wait())
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait((opened, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
        if not self._opened.is_set():
            await asyncio.gather(*self._readers)
            raise self._why()

    async def keep(self, answers: Callable[[], int], moved: Callable[[str], None]) -> None:
        """Start it again where a signal killed it.

        Args:
            answers: how many there were until now.
            moved: told of the new address.

        Raises:
            TurbofitError: it ended otherwise, or dies again and again.
        """
        deaths, before = 0, -1
        while True:
            assert self._process is not None
            code = await self._process.wait()
            await asyncio.gather(*self._readers)
            deaths, before = (1 if answers() > before else deaths + 1), answers()
            if code >= 0 or deaths > _MOST_DEATHS:
                raise self._why()
            self._say(f"warning: the server was killed by signal {-code}: starting it again")
            await self.start()
            moved(self.url)

    async def end(self) -> None:
        """End it in order, and whatever happens."""
        self._ending = True
        if self._process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._process.returncode is None:
                    with suppress(ProcessLookupError):
                        self._process.send_signal(number)
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        await asyncio.gather(*self._readers, return_exceptions=True)

    def record(self) -> RunRecord:
        """Its run's record, which tells what it was started with.

        Raises:
            LaunchError: it is not there.
        """
        assert self._process is not None
        for _, found in recorded_runs():
            if found.pid == self._process.pid:
                return found
        raise LaunchError(
            "the server's record is not in the state folder",
            hint="set XDG_STATE_HOME to a folder that can be written",
        )

    def running(self, record: RunRecord) -> tuple[int, Limits | None]:
        """How many requests run at once, and to what each is held."""
        last = record.attempts[-1]
        return last.requests_at_once, last.limits

    def _why(self) -> TurbofitError:
        """Its error, from its last lines."""
        assert self._process is not None
        code = self._process.returncode or 0
        message = hint = ""
        for line in self._last:
            if line.startswith("error: "):
                message = line.removeprefix("error: ")
            elif line.startswith("hint: "):
                hint = line.removeprefix("hint: ")
        if message:
            return error_from({"exit_code": code, "message": message, "hint": hint})
        last = self._last[-1] if self._last else "it said nothing"
        return LaunchError(
            f"the server ended with {code}: {last}", hint="see turbofit report latest"
        )

    async def _read_urls(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            self.url = line.decode(errors="replace").strip()
            self._opened.set()

    async def _read_lines(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            self._last.append(text)
            if not self._ending and not text.startswith(("error: ", "hint: ")):
                self._say(text)
