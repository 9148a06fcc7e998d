"""The gateway as an ASGI app: who may ask, what is passed on, and what is told and written down."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.gateway.admission import Admission, Cost, dead
from turbofit.gateway.body import Bodies
from turbofit.gateway.call import Call, answer, entry, sent_headers
from turbofit.gateway.engines import Affinity, Engine, least_busy
from turbofit.gateway.fetch import Fetcher
from turbofit.gateway.films import Films
from turbofit.gateway.guard import Keys, Origins
from turbofit.gateway.health import Monitor, healthy
from turbofit.gateway.metrics import Metrics, merge
from turbofit.gateway.prepare import finish, remote_urls, start
from turbofit.gateway.refusals import Refusal, refusal_body
from turbofit.gateway.relay import Relay
from turbofit.gateway.routes import api_of, find_route
from turbofit.gateway.upstream import Unreachable, Upstream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping, Sequence

    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.limits import Bounds
    from turbofit.gateway.routes import Route

    Chooser = Callable[[Sequence[Engine]], Engine]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

__all__ = ["Gateway"]

_PAGE_SECONDS: Final = 3.0


class Gateway:
    """The app.

    Args:
        bounds: what requests are held to.
        upstreams: addresses of the engines.
        config: everything else.
        log: takes one record a request; it holds no prompt and no image.
        fetcher: for tests.
        upstream: for tests.
    """

    def __init__(
        self,
        bounds: Bounds,
        upstreams: Sequence[str],
        config: GatewayConfig,
        log: Callable[[dict[str, Any]], None] | None = None,
        fetcher: Fetcher | None = None,
        upstream: Upstream | None = None,
    ) -> None:
        self.bounds, self.config = bounds, config
        shares = config.shares or (1.0,) * len(upstreams)
        self.engines = tuple(
            Engine(i, url, share)
            for i, (url, share) in enumerate(zip(upstreams, shares, strict=True))
        )
        self.metrics = Metrics()
        self._log = log or (lambda _: None)
        self._keys, self._origins = Keys(config.api_keys), Origins(config.allow_origins)
        self._bodies = Bodies(bounds.limits.bytes_per_body, config.body_seconds)
        self._fetcher = fetcher or Fetcher(config.allowed_media_domains)
        self._films = Films()
        self._upstream = upstream or Upstream(config.upstream_key, serial=config.serial)
        self.admission = Admission(
            self.engines,
            gate=bounds.gate,
            host_bytes=config.host_bytes,
            longest=config.queue_length,
            seconds=config.queue_seconds,
        )
        self.monitor = Monitor(
            self.engines,
            self._upstream.probe,
            self.admission.pump,
            idle=config.idle_seconds,
            stall=config.stall_seconds,
            retry=config.retry_seconds,
            patience=config.probe_seconds,
        )
        self._affinity = Affinity() if config.prefix_affinity and len(upstreams) > 1 else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def startup(self) -> None:
        """Begin to watch the engines; a server does it through ASGI's lifespan."""
        self.monitor.start()

    async def shutdown(self) -> None:
        """Stop watching and close all connections."""
        await self.monitor.stop()
        await self._upstream.close()
        await self._fetcher.close()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.startup()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.shutdown()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        call = Call(scope)
        watch: asyncio.Task[None] | None = None
        try:
            raw_path = _raw_path(scope)
            call.api = api_of(raw_path)
            if call.method == "OPTIONS":
                call.out += self._origins.preflight(call.headers)
                await answer(call, send, 204, b"", "text/plain")
                return
            call.out += self._origins.check(call.headers)
            if raw_path != b"/health":
                # Before the route: strangers learn nothing of what exists.
                call.key = self._keys.check(call.headers)
            call.route = find_route(call.method, raw_path)
            call.api = call.route.api
            if call.route.kind in ("health", "metrics"):
                await self._own(call, send)
                return
            if call.route.method == "POST":
                call.body = await self._bodies.read(call.headers, receive)
            call.bytes_in, call.read = len(call.body), time.perf_counter()
            self._bodies.keep(call.bytes_in)
            watch = asyncio.ensure_future(_watch(receive, call, asyncio.current_task()))
            try:
                await self._pass_on(call, send)
            finally:
                self._forget(call)
        except Refusal as refusal:
            await self._refuse(call, refusal, send)
        except asyncio.CancelledError:
            if not call.gone:
                raise
            self.metrics.count("disconnected_total")
            call.reason = "disconnected"
        except Exception as exc:  # noqa: BLE001 - a bug of ours must not kill a connection unsaid
            call.reason = f"bug: {type(exc).__name__}"
            await self._refuse(call, Refusal(500, "internal", "an internal error"), send)
            self._bug(exc)
        finally:
            if watch is not None:
                watch.cancel()
            self._record(call)

    async def _pass_on(self, call: Call, send: Send) -> None:
        """Hold it to the plan, wait for room, and carry it to an engine."""
        choose: Chooser = least_busy
        assert call.route is not None
        if call.route.method == "POST":
            choose = await self._prepare(call, call.route)
        prepared = call.prepared
        if prepared.lowered:
            call.out.append((b"x-turbofit-limited", _joined(prepared.lowered)))
        cost = Cost(units=prepared.units, host_bytes=prepared.host_bytes)
        for _ in range(len(self.engines) + 1):
            engine = await self.admission.admit(call.key or call.client, cost, choose)
            try:
                await self._carry(call, engine, cost, send)
            except Unreachable:
                self.monitor.suspect(engine, gone=True)
                self.metrics.count("engine_failures_total", f"engine={engine.index}")
            else:
                return
        raise dead()

    async def _prepare(self, call: Call, route: Route) -> Chooser:
        """The body as it goes on, and how to choose an engine for it."""
        parsed = start(self.bounds, route.kind, call.body)
        most = self.bounds.limits.bytes_per_image
        fetched = await self._fetcher.fetch_all(remote_urls(parsed), most)
        clip = await self._films.look(parsed, fetched, most)
        call.body, call.prepared = finish(self.bounds, route.kind, parsed, fetched, clip)
        return least_busy if self._affinity is None else self._affinity.chooser(parsed.body)

    def _forget(self, call: Call) -> None:
        """The body was sent: a stream may last for minutes, and need not hold megabytes."""
        if call.bytes_in and call.counted:
            call.counted = False
            self._bodies.keep(-call.bytes_in)
        call.body = b""

    async def _carry(self, call: Call, engine: Engine, cost: Cost, send: Send) -> None:
        """To one engine; the room taken there is given back exactly once."""
        route = call.route
        assert route is not None
        held = [cost]

        def let_go() -> None:
            if held:
                self.admission.release(engine, held.pop())

        def first() -> None:
            # Of several copies the first byte tells only about one.
            to_end = self.bounds.gate_to_end and cost.units
            if call.prepared.copies == 1 and not to_end:
                let_go()

        relay = Relay(
            self._upstream,
            engine,
            route,
            call.prepared,
            send,
            call.out,
            lambda: self._forget(call),
            first,
        )
        call.engine, call.outcome = engine, relay.outcome
        try:
            await relay.run(call.body, sent_headers(call))
        finally:
            let_go()
            if relay.outcome.broken or relay.outcome.failed:
                self.monitor.suspect(engine)
                self.metrics.count("engine_failures_total", f"engine={engine.index}")

    async def _own(self, call: Call, send: Send) -> None:
        """The two pages of the gateway itself."""
        assert call.route is not None
        if call.route.kind == "health":
            fine = healthy(self.engines)
            up = sum(engine.up for engine in self.engines)
            word = "healthy" if fine else "unavailable"
            counts = {"status": word, "engines": len(self.engines), "up": up}
            body = msgspec.json.encode(counts)
            await answer(call, send, 200 if fine else 503, body, "application/json")
            return
        pages = await asyncio.gather(
            *(self._upstream.page(engine, "/metrics", _PAGE_SECONDS) for engine in self.engines)
        )
        text = merge({engine.index: page for engine, page in zip(self.engines, pages, strict=True)})
        kind = "text/plain; version=0.0.4; charset=utf-8"
        await answer(call, send, 200, (text + self.metrics.text(self._gauges())).encode(), kind)

    def _gauges(self) -> dict[str, list[tuple[tuple[str, ...], float]]]:
        labelled = [((f"engine={engine.index}",), engine) for engine in self.engines]
        return {
            "waiting": [((), self.admission.waiting)],
            "in_flight": [(label, engine.outstanding) for label, engine in labelled],
            "units_in_flight": [(label, engine.units) for label, engine in labelled],
            "host_bytes_in_flight": [(label, engine.host_bytes) for label, engine in labelled],
            "engine_up": [(label, int(engine.up)) for label, engine in labelled],
        }

    async def _refuse(self, call: Call, refusal: Refusal, send: Send) -> None:
        call.reason = call.reason or refusal.reason
        self.metrics.count("refused_total", f"reason={refusal.reason}")
        if call.outcome is not None and call.outcome.started:
            return
        if refusal.retry_after is not None:
            call.out.append((b"retry-after", str(refusal.retry_after).encode()))
        if refusal.status == 401:
            call.out.append((b"www-authenticate", b"Bearer"))
        body = refusal_body(call.api, refusal, call.id)
        await answer(call, send, refusal.status, body, "application/json")

    def _record(self, call: Call) -> None:
        """One line of the log, and the counters."""
        prepared, outcome = call.prepared, call.outcome
        if outcome is not None and outcome.started:
            call.status = outcome.status
        path = call.route.path if call.route else ""
        self.metrics.count("requests_total", f"route={path}", f"status={call.status}")
        for word in dict.fromkeys(word.partition("=")[0] for word in prepared.lowered):
            self.metrics.count("limited_total", f"what={word}")
        if outcome is not None:
            self.metrics.count("images_total", by=prepared.images)
            self.metrics.count("units_total", by=prepared.units)
        first = outcome.first_byte if outcome is not None else None
        if first is not None and call.method == "POST":
            self.metrics.first_byte(first - call.read)
        if path != "/health" or call.status != 200:
            self._log(entry(call, path, first))

    def _bug(self, exc: BaseException) -> None:
        """Hand a bug of ours to the loop's handler, which shows a traceback."""
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "a bug in turbofit's gateway", "exception": exc})


async def _watch(receive: Receive, call: Call, task: asyncio.Task[Any] | None) -> None:
    """End the request when its client goes away."""
    while True:
        if (await receive())["type"] == "http.disconnect":
            call.gone = True
            if task is not None:
                task.cancel()
            return


def _raw_path(scope: Message) -> bytes:
    """The path as it was sent, without the query."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.partition(b"?")[0]


def _joined(words: Sequence[str]) -> bytes:
    return ", ".join(words)[:1024].encode("ascii", "replace")
