"""The gateway as an ASGI app: it admits clients, passes requests on, and records them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from turbofit.core.process.interpreter import in_thread
from turbofit.core.struct import Document
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.first_tokens import FirstTokens
from turbofit.gateway.grammar_trials import GrammarTrials
from turbofit.gateway.http.about import ClockFacts, ModelFacts, facts_of
from turbofit.gateway.http.asgi_app import AsgiApp, Log, while_connected
from turbofit.gateway.http.body import LARGE
from turbofit.gateway.http.metrics import Gauges, merge
from turbofit.gateway.http.prepare import Preparation
from turbofit.gateway.http.request_context import Receive, RequestContext, Send
from turbofit.gateway.http.routes import Route, hold_name
from turbofit.gateway.limits.gate import Gate
from turbofit.gateway.limits.request_limits import Bounds
from turbofit.gateway.media.clips import video_of
from turbofit.gateway.media.fetch import MediaFetcher
from turbofit.gateway.media.pictures import PicturePermits
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.dear_steps import DearSteps
from turbofit.gateway.routing.deny_list import DenyList
from turbofit.gateway.routing.engines import Fleet, Outage, RoutedEngine
from turbofit.gateway.routing.health import Monitor, healthy, trouble
from turbofit.gateway.routing.request_forwarder import RequestForwarder
from turbofit.gateway.upstream import Upstream

#: Seconds to wait for an engine's metrics; Prometheus itself waits for 10 s.
_PAGE_SECONDS: Final = 3.0
#: The most processes that read the headers of films at once.
_LOOKED_AT: Final = 2
#: The most threads that read, check and write a large request at once. Nearly all of this work
#: holds Python's lock, so a second thread would only delay the event loop.
_WORKED_ON: Final = 1
#: The largest number of pictures that are resized at once, whatever the number of cores.
_MOST_RESIZED: Final = 16
#: What a gateway says of itself before engines that turbofit did not start, if images queue.
_UNTOLD: Final = (
    "an answer in one piece holds image requests back until its end, since the engines do not tell"
    " its first token; a plan with --no-queue-images has no such wait"
)

_T = TypeVar("_T")


class Gateway(AsgiApp):
    """The gateway's app; ``bounds`` limit requests, ``upstreams`` are the engines' URLs.

    ``deny_list`` is the deny list of the previous gateway, if there was one. ``grammars`` tries the
    grammars of requests; None if no engine compiles grammars. ``in_use`` returns the bytes in use
    on each GPU, by index. Only tests pass ``fetcher`` and ``upstream``.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        bounds: Bounds,
        upstreams: Sequence[str],
        config: GatewayConfig,
        log: Log | None = None,
        fetcher: MediaFetcher | None = None,
        upstream: Upstream | None = None,
        deny_list: DenyList | None = None,
        grammars: GrammarTrials | None = None,
        in_use: Callable[[], dict[int, int]] = dict,
        clock: Callable[[], ClockFacts | None] = lambda: None,
    ) -> None:
        super().__init__(config, bounds.limits.bytes_per_body, log, clock)
        self.bounds = bounds
        engines = [bounds.engine_bounds(number, len(upstreams)) for number in range(len(upstreams))]
        self.fleet = Fleet(
            [
                RoutedEngine(
                    number,
                    url,
                    engine.share,
                    key=config.upstream_key,
                    gate=Gate(engine.units, engine.kv),
                    host_limit=bounds.host_bytes,
                )
                for number, (url, engine) in enumerate(zip(upstreams, engines, strict=True))
            ]
        )
        for engine in self.fleet.engines:
            engine.prefix_caching = bounds.prefix_caching
        self._fetcher = fetcher or MediaFetcher(
            config.allowed_media_domains, config.allowed_media_networks
        )
        self._looking = asyncio.Semaphore(_LOOKED_AT)
        self._working = asyncio.Semaphore(_WORKED_ON)
        self._resizing = PicturePermits(min(config.cores - 1, _MOST_RESIZED))
        self._upstream = upstream or Upstream(serial=bounds.serial)
        self.admission = Admission(
            self.fleet, longest=config.queue_length, seconds=config.queue_seconds,
            at_once=config.max_concurrent_requests,
        )  # fmt: skip
        self.monitor = Monitor(self.engines, self._upstream, config, self.admission.pump)
        self.deny_list = deny_list or DenyList()
        self.deny_list.count = self.metrics.count
        self.in_use, self._grammars = in_use, grammars
        #: The tasks that start the trials' process, and that look for dear grammars.
        self._tasks: list[asyncio.Task[None]] = []
        #: The last call of ``in_use``, which may still run.
        self._asked: asyncio.Future[dict[int, int]] | None = None
        self._first_tokens = FirstTokens(self._upstream)
        self._forwarder = RequestForwarder(
            self.fleet, self.admission, self._upstream, self.monitor.doubt, self.monitor.suspect,
            self.deny_list, self._first_tokens, self._bodies, self.metrics,
        )  # fmt: skip

    @property
    def engines(self) -> tuple[RoutedEngine, ...]:
        return self.fleet.engines

    def _waits(self) -> list[str]:
        if healthy(self.engines):
            told = all(engine.tells_first_tokens for engine in self.engines if engine.up)
            untold = "" if told or self.bounds.gate is None else _UNTOLD
            return [text for text in (self.admission.waits_for, untold) if text]
        return [f"no engine answers; the next one is expected in {self.fleet.retry_seconds} s"]

    def rest(self, outage: Outage | None) -> None:
        """Note that an outage of all engines begins, or, with None, that the outage ends.

        During an outage the engines get no requests, since another program may listen at their
        addresses. Call this method in the gateway's event loop.
        """
        self.fleet.outage = outage
        for engine in self.engines if outage is not None else ():
            engine.rested = True
            self.monitor.doubt(engine)

    def engine_ended(self, index: int, *, other_cause: bool) -> None:
        """Tell the deny list that an engine's process ended.

        Call this method in the gateway's event loop. ``other_cause``: no request is to blame, since
        the process was killed, its GPU is lost, or other processes took its memory.
        """
        self.deny_list.engine_ended(self.engines[index], other_cause=other_cause)

    def doubt(self, index: int, ends_at: float) -> None:
        """Send an engine no new requests until it answers.

        The supervisor sees no sign that the engine lives, and will end the engine at ``ends_at``, a
        time of `time.monotonic`. Call this method in the gateway's event loop.
        """
        self.engines[index].ends_at = ends_at
        self.monitor.doubt(self.engines[index])

    def engine_ready(self, index: int) -> None:
        """Probe a restarted engine at once, since the engine has answered its supervisor.

        Call this method in the gateway's event loop.
        """
        self.monitor.ask_now(self.engines[index])

    def start_trials(self) -> None:
        """Start the process that tries grammars; call this method in the gateway's event loop."""
        if self._grammars is not None:
            self._tasks.append(asyncio.ensure_future(self._grammars.start()))

    def take_over(self, config: GatewayConfig) -> None:
        """Apply the keys, origins, hosts and media domains of ``config``.

        Call this method in the gateway's event loop.
        """
        self.config = self.config.taking_over(config)
        self._let_in(self.config)
        self._fetcher.allow(config.allowed_media_domains, config.allowed_media_networks)

    async def startup(self) -> None:
        self.monitor.start()
        self._first_tokens.start(self.engines if not self.bounds.serial else ())
        if self._grammars is not None:
            dear_steps = DearSteps(self.engines, self._grammars)
            self._tasks.append(asyncio.ensure_future(dear_steps.watch()))

    async def shutdown(self) -> None:
        await self.monitor.stop()
        await self._first_tokens.stop()
        await self._upstream.close()
        for task in self._tasks:
            task.cancel()
        if self._grammars is not None:
            await self._grammars.end()
        self._close_log()

    async def _serve(
        self, request: RequestContext, route: Route, /, receive: Receive, send: Send
    ) -> None:
        await self._bodies.take(request, receive)
        with while_connected(receive, request):
            try:
                if route.method == "POST":
                    await self._prepare(request, route)
                if request.prepared.lowered:
                    lowered = ", ".join(request.prepared.lowered)[:1024]
                    request.answer_headers.append(
                        (b"x-turbofit-limited", lowered.encode("ascii", "replace"))
                    )
                await self._forwarder.forward(request, send)
            finally:
                self._bodies.forget(request)

    def _models(self) -> tuple[ModelFacts, ...]:
        """Return the facts of the model and of each adapter for the chat page.

        If clients may use several names for a model, the first name is shown.
        """
        config, first = self.config, dict[str, str]()
        for name, of_engine in config.names.items():
            first.setdefault(of_engine, name)
        return facts_of(first.values(), self.bounds, config.defaults.words, config.memory)

    async def _prepare(self, request: RequestContext, route: Route) -> None:
        """Replace a client's body by a body for an engine, with all images and videos inline.

        Raises:
            Refusal: the request cannot be reduced to the limits of the plan.
        """
        given = (self.bounds, route.kind, request.body, self.config.defaults)
        large = len(request.body) >= LARGE
        prepared = await self._work(large, Preparation, *given)
        hold_name(self.config.names, prepared.parsed.body)
        if self._grammars is not None and prepared.generates:
            request.grammar = await self._grammars.check(prepared.parsed.body, request.who)
        most = self.bounds.limits.bytes_per_image

        def count(url: str, size: int) -> None:
            self._keep_more(request, prepared.inlines(url, size))

        remote = dict.fromkeys(slot.source for slot in prepared.parsed.slots if slot.remote)
        fetched = await self._fetcher.fetch_all(list(remote), most, count, request.who)
        clip = await video_of(prepared.parsed, fetched, most, self._looking)
        large |= request.bytes_in >= LARGE
        # The search for a common limit of eight images takes up to 0.5 s for Llama 4.
        several = len(prepared.parsed.slots) > 1
        await self._work(large or several, prepared.hold, fetched, clip)
        if prepared.generates:
            before = prepared.payload
            await prepared.resize(self._resizing)
            self._keep_more(request, prepared.payload - before)
        seconds = 0.0 if request.grammar is None else request.grammar.price
        request.body, request.prepared = await self._work(large, prepared.finish, seconds)

    async def _work(self, long: bool, act: Callable[..., _T], *arguments: Any) -> _T:
        """Call ``act`` and return its result.

        If ``long``, the call runs in a thread, so that the event loop goes on.
        """
        if not long:
            return act(*arguments)
        async with self._working:
            return await in_thread(act, *arguments)

    def _keep_more(self, request: RequestContext, size: int) -> None:
        """Count ``size`` more bytes for a request's body; refuse the request if memory is short."""
        if size > 0:
            self._bodies.count(size, request.who)
            request.bytes_in += size
            self._bodies.check_room(request.who)

    def _health(self, _: RequestContext, /) -> tuple[Document, int | None]:
        fleet, fine = self.fleet, healthy(self.engines)
        page: Document = {
            "status": "healthy",
            "engines": len(self.engines),
            "up": sum(engine.serves for engine in self.engines),
            "draining": self.connections.draining,
            **self.config.about,
        }
        if not fine:
            page.update(trouble(fleet.outage))
        return page, None if fine else fleet.retry_seconds

    async def metrics_text(self) -> str:
        """Return the metrics of the gateway, and of the engines that answer in time, as text."""
        texts = await asyncio.gather(
            *(self._upstream.page(engine, "/metrics", _PAGE_SECONDS) for engine in self.engines)
        )
        pages: dict[int | str, str] = dict(enumerate(texts))
        # A driver may hang. So only one thread of the pool asks at a time.
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(asyncio.to_thread(self.in_use))
        await asyncio.wait({self._asked}, timeout=_PAGE_SECONDS)
        in_use = self._asked.result() if self._asked.done() else {}
        suspected, refused = self.deny_list.numbers
        labelled = [((f"engine={engine.index}",), engine) for engine in self.engines]
        gated = [(label, engine) for label, engine in labelled if engine.gate.units is not None]
        gauges: Gauges = {
            "connections": [((), len(self.connections))],
            "waiting": [((), self.admission.waiting)],
            "suspects": [((), suspected)],
            "convicted": [((), refused)],
            "gpu_bytes_in_use": [((f"gpu={index}",), size) for index, size in in_use.items()],
            "in_flight": [(label, engine.outstanding) for label, engine in labelled],
            "units_in_flight": [(label, engine.gate.counted) for label, engine in labelled],
            "kv_tokens_reserved": [(label, engine.gate.reserved) for label, engine in gated],
            "host_bytes_in_flight": [(label, engine.host_bytes) for label, engine in labelled],
            "first_tokens_told": [
                (label, int(engine.tells_first_tokens)) for label, engine in labelled
            ],
            "engine_up": [(label, int(engine.serves)) for label, engine in labelled],
        }
        return merge(pages) + self.metrics.text(gauges)

    def _record(self, request: RequestContext) -> None:
        """Count a request, its images and what was lowered, and log it."""
        prepared, first_byte = request.prepared, request.first_byte
        if self.connections.ending:
            # The server itself has answered the client, without this app.
            request.status, request.reason = request.status if request.started else 503, "ending"
        super()._record(request)
        for word in dict.fromkeys(word.partition("=")[0] for word in prepared.lowered):
            self.metrics.count("limited_total", f"what={word}")
        if request.engine is None:
            return
        self.metrics.count("images_total", by=prepared.images)
        self.metrics.count("units_total", by=prepared.cost.units)
        if first_byte is not None and request.method == "POST":
            self.metrics.first_byte(first_byte - request.read_at)
