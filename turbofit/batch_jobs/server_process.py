"""``turbofit serve`` for one batch, started as anybody would; the process ends with this one."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError, error_from
from turbofit.core.process.guard import guarded
from turbofit.core.process.variable_names import without_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

SERVE: Final = (sys.executable, "-m", "turbofit", "serve")
#: Seconds that a stopped server has to drain and to check that its memory is free; then a kill.
_END_SECONDS: Final = 90.0


@asynccontextmanager
async def serving(
    words: Sequence[str], say: Callable[[str], None]
) -> AsyncIterator[tuple[str, str, Awaitable[None]]]:
    """A server from when it serves to its end; ``words`` follow ``turbofit serve``.

    It comes as its URL, its key, and what raises a `TurbofitError` once it ends by itself. ``say``
    receives what it says.

    Raises:
        TurbofitError: it does not serve.
    """
    key = secrets.token_hex(16)
    process = await asyncio.create_subprocess_exec(
        *guarded([*SERVE, "--port", "0", *words]), stdin=DEVNULL, stdout=PIPE, stderr=PIPE,
        env={**without_options(os.environ), "TURBOFIT_API_KEY": key}, limit=1 << 20,
        start_new_session=True,  # Ctrl-C reaches only us, and we end it
    )  # fmt: skip
    ended = asyncio.ensure_future(_follow(process, say))
    try:
        assert process.stdout is not None
        # Its only line on stdout is the address, once it serves.
        url = (await process.stdout.readline()).decode(errors="replace").strip()
        if not url:
            await ended
        yield url, key, asyncio.shield(ended)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                process.send_signal(number)
            await asyncio.wait((ended,), timeout=_END_SECONDS)
        await asyncio.gather(ended, return_exceptions=True)


async def _follow(process: asyncio.subprocess.Process, say: Callable[[str], None]) -> None:
    """Pass on its lines; when it ends, raise its error."""
    assert process.stderr is not None
    last, error = "it said nothing", {"error": "", "hint": ""}
    while line := await process.stderr.readline():
        last = line.decode(errors="replace").rstrip()
        word, _, text = last.partition(": ")
        if word in error:
            error[word] = text
        else:
            say(last)
    code = await process.wait()
    if error["error"]:
        raise error_from({"exit_code": code, "message": error["error"], "hint": error["hint"]})
    raise LaunchError(
        f"the server ended with {code}: {last}",
        hint="see turbofit report latest; the same command goes on from here",
    )
