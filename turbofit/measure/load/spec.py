"""The specification of a load: its requests, how they arrive, and when it ends."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from turbofit.core.errors import UsageError
from turbofit.core.process.network import open_files
from turbofit.core.process.processes import stop_signals
from turbofit.core.validation import SECONDS, Metavar, Validated
from turbofit.measure.load.client import LoadClient
from turbofit.measure.load.driver import LoadRun
from turbofit.measure.load.prompt import PromptWriter
from turbofit.measure.load.result import summary
from turbofit.planning.request import Count, Positive, Size, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.measure.load.result import LoadResult

Seconds = Annotated[float, Field(gt=0, lt=1e6), SECONDS, Metavar("SECONDS")]

_SECONDS: Final = 60.0
_CONCURRENCY: Final = 8


class LoadSpec(Validated):
    """One load. Without a rate it is a closed loop: each answer lets the next request begin."""

    images: Count = Field(default=1, description="images a request")
    image_size: Size = Field(default=(1024, 768), description="width and height of an image")
    prompt_tokens: Tokens = Field(
        default=256, description="words before an answer, about a token each"
    )
    shared_prefix: Count = Field(
        default=0, description="tokens with which all prompts begin alike, of --prompt-tokens"
    )
    output_tokens: Tokens = Field(default=128, description="tokens of an answer")
    stop_early: bool = Field(
        default=False,
        description="an answer may end before its --output-tokens (else ignore_eos is sent)",
    )
    concurrency: Positive | None = Field(
        default=None,
        description=f"requests at once, in a closed loop (default {_CONCURRENCY}; tune: twice what"
        " the plan runs, 128 at most)",
    )
    rate: Annotated[float | None, Field(gt=0, lt=1e6), Metavar("PER-SECOND")] = Field(
        default=None,
        description="requests that arrive a second, whatever is answered: an open loop (Poisson)",
    )
    requests: Positive | None = Field(default=None, description="requests that are measured")
    seconds: Seconds | None = Field(
        default=None,
        description=f"time that is measured (default {_SECONDS:g}, or --requests; tune: 30)",
    )
    warm_up: Count | None = Field(
        default=None,
        description="requests that come before and do not count (default: --concurrency; 8 with "
        "--rate)",
    )
    timeout: Seconds = Field(default=600.0, description="the longest that a request may take")

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: the first such option.
        """
        if self.concurrency is not None and self.rate is not None:
            raise UsageError(
                "--concurrency and --rate do not go together",
                hint="a load is a closed loop or an open one",
            )
        if self.shared_prefix >= self.prompt_tokens and self.shared_prefix:
            raise UsageError(
                f"--shared-prefix {self.shared_prefix} is no part of {self.prompt_tokens} tokens",
                hint="raise --prompt-tokens",
            )

    @property
    def at_once(self) -> int | None:
        """The number of requests at once in a closed loop; None in an open loop."""
        return None if self.rate is not None else self.concurrency or _CONCURRENCY

    @property
    def measured_seconds(self) -> float | None:
        """The seconds of the window that is measured; None if the number of requests ends it."""
        if self.seconds is None and self.requests is None:
            return _SECONDS
        return self.seconds

    @property
    def warm_up_requests(self) -> int:
        """The number of requests before the window."""
        return (self.at_once or _CONCURRENCY) if self.warm_up is None else self.warm_up


_FILES: Final = 65536
#: Seconds without a byte after which a request has stalled.
_SILENCE: Final = 120.0


def bench(
    url: str,
    spec: LoadSpec,
    *,
    key: str | None = None,
    model: str | None = None,
    tick: Callable[[LoadRun], None] = lambda _: None,
) -> LoadResult:
    """Drive a load on a server and return what it measured; a signal ends it early.

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
