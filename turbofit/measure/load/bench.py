"""A load on one server, from the first request to the figures."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Final

from turbofit.core.process.ports import open_files
from turbofit.core.process.signals import stop_signals
from turbofit.measure.load.client import LoadClient
from turbofit.measure.load.driver import LoadRun
from turbofit.measure.load.prompt import PromptWriter
from turbofit.measure.load.result import summary

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.measure.load.result import LoadResult
    from turbofit.measure.load.spec import LoadSpec

_FILES: Final = 65536
#: A request without a byte for so many seconds has stalled.
_SILENCE: Final = 120.0


def bench(
    url: str,
    spec: LoadSpec,
    *,
    key: str | None = None,
    model: str | None = None,
    tick: Callable[[LoadRun], None] = lambda _: None,
) -> LoadResult:
    """Drive the load and measure; the first signal ends it with the measurements so far.

    ``model`` None is the server's first model; ``tick`` is called each second.

    Raises:
        UsageError: the options contradict each other, or the server refuses this client.
        UnservedError: the server does not answer.
    """
    spec.check()
    open_files(_FILES)  # each request needs a socket; shells often allow 1,024

    async def drive() -> LoadResult:
        async with LoadClient(url, key, timeout=spec.timeout, silence=_SILENCE) as client:
            name = model or await client.model()
            writer = PromptWriter(name, spec)
            run = LoadRun(spec, lambda: client.ask(writer.body()), tick)
            loop = asyncio.get_running_loop()
            for number in stop_signals():
                loop.add_signal_handler(number, run.stop, signal.Signals(number).name)
            wall, cpu = time.perf_counter(), time.process_time()
            await run.run()
            busy = (time.process_time() - cpu) / max(time.perf_counter() - wall, 1e-9)
            return summary(run, url=url, model=name, busy=busy)

    return asyncio.run(drive())
