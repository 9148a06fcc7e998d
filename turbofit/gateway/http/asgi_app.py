"""The common base of a gateway's ASGI apps: access, routes, pages, records and refusals."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Protocol, TypeAlias, runtime_checkable

import msgspec

from turbofit.core.messages import PRETEND_WORDS
from turbofit.core.struct import Document
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.about import About, ClockFacts, ModelFacts, chat_page
from turbofit.gateway.http.access import Hosts, Keys, Origins
from turbofit.gateway.http.body import Bodies
from turbofit.gateway.http.connections import Connections, Networks
from turbofit.gateway.http.metrics import Metrics
from turbofit.gateway.http.refusals import Refusal, refusal_body
from turbofit.gateway.http.request_context import (
    Message,
    Receive,
    RequestContext,
    Send,
    answer,
    log_record,
)  # fmt: skip
from turbofit.gateway.http.routes import (
    Route,
    api_of,
    find_route,
    models_document,
)

#: Takes the record of each request.
Log: TypeAlias = Callable[[Document], None]

_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
#: Routes that are called again and again; the access log has only their failures.
_POLLED: Final = ("/health", "/about", "/metrics")
#: The paths of the chat page, without a slash at their end.
_PAGES: Final = (b"", b"/docs")
#: The paths of pages that tell of the server and of its use.
_OF_USE: Final = (*_PAGES, b"/about", b"/metrics")


@runtime_checkable
class OpenLog(Protocol):
    """A `Log` that is a file: it is closed after the last request."""

    def close(self) -> object:
        """Write the last lines, and close the file."""


class AsgiApp(ABC):
    """An ASGI app for HTTP requests with bodies of up to ``most`` bytes.

    The server of the app calls `startup` before the first request, and `shutdown` after the last
    request. ``log`` receives one record a request, without prompts and images. ``clock`` reads how
    time passes on pretend GPUs, and returns None without such a clock.
    """

    def __init__(
        self,
        config: GatewayConfig,
        most: int,
        log: Log | None = None,
        clock: Callable[[], ClockFacts | None] = lambda: None,
    ) -> None:
        self.config, self._log = config, log or (lambda _: None)
        self.metrics = Metrics()
        self.clock = clock
        self._let_in(config)
        self.connections = Connections(
            config.connection, Networks(config.trusted_proxies), self.metrics.count
        )
        self._bodies = Bodies(most, config)

    def _let_in(self, config: GatewayConfig) -> None:
        """Admit only clients that the keys, hosts and origins of ``config`` allow, from now on."""
        self._keys, self._hosts = Keys(config.api_key, config.front_keys), Hosts(config)
        self._origins = Origins(config.allow_origins, self._hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):  # the server ends, and has answered the client
            await self._http(scope, receive, send)

    async def startup(self) -> None:  # noqa: B027 - some apps have nothing to do
        """Start the tasks of the app; the server calls this method before the first request."""

    async def shutdown(self) -> None:  # noqa: B027 - some apps have nothing to do
        """Stop the tasks of the app; the server calls this method after the last request."""

    @abstractmethod
    async def _serve(
        self, request: RequestContext, route: Route, /, receive: Receive, send: Send
    ) -> None:
        """Answer a request from an authorised client, or raise a `Refusal`."""

    @abstractmethod
    def _health(self, request: RequestContext, /) -> tuple[Document, int | None]:
        """Return the health page and, if no request is served, the seconds until a retry."""

    @abstractmethod
    async def metrics_text(self) -> str:
        """Return all metrics in Prometheus' text format."""

    def _names(self) -> Mapping[str, str]:
        """Return each name that clients may use, and the model that it means.

        The result is empty if clients get the engines' own list.
        """
        return self.config.names

    def _record(self, request: RequestContext) -> None:
        """Count a request by route and status, and log it; of polled routes, only failures."""
        path = request.route.path if request.route else ""
        self.metrics.count("requests_total", f"route={path}", f"status={request.status}")
        if path not in _POLLED or request.status != 200:
            self._log(log_record(request, path))

    def _close_log(self) -> None:
        if isinstance(self._log, OpenLog):
            self._log.close()

    def _models(self) -> Sequence[ModelFacts]:
        """Return the facts of each model; empty if only the engines know the models."""
        return ()

    def _pretends(self) -> bool:
        """Return whether the GPUs behind this address are pretend ones."""
        return self.config.pretend

    def _waits(self) -> list[str]:
        """Return sentences that say why requests wait now; empty if no request has to wait."""
        return []

    async def _page(self, request: RequestContext, route: Route, send: Send) -> bool:
        """Answer a request for a page that needs no engine; return False for any other request."""
        status, kind = 200, "application/json"
        if route.kind == "health":
            page, retry = self._health(request)
            if retry is not None:
                status = 503
                request.answer_headers.append((b"retry-after", str(retry).encode()))
            body = msgspec.json.encode({**page, "pretend": True} if self._pretends() else page)
        elif route.kind == "about":
            clock, pretend = self.clock(), self._pretends()
            warnings = (PRETEND_WORDS,) if clock is None else (PRETEND_WORDS, clock.words)
            body = msgspec.json.encode(
                About(
                    pretend=pretend,
                    key=bool(self.config.api_key),
                    notices=(*(warnings if pretend else ()), *self._waits()),
                    models=tuple(self._models()),
                    clock=clock,
                )
            )
        elif route.kind == "metrics":
            body, kind = (await self.metrics_text()).encode(), _METRICS_TYPE
        elif route.kind == "models" and (names := self._names()):
            body = msgspec.json.encode(models_document(names, request.api, route.model))
        elif route.model:  # `/v1/models/NAME`, but only the engines know the names
            raise Refusal("not_found")
        else:
            return False
        await answer(request, send, status, body, kind)
        return True

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        """Check the client's access, find the route, answer the request, and record it.

        Every error becomes an answer in the form of the client's API.
        """
        request = RequestContext(scope)
        try:
            path = (scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0]
            request.api = api_of(path)
            reads = request.method in ("GET", "HEAD")
            tells_of_use = reads and path.rstrip(b"/") in _OF_USE
            self._hosts.check(request.headers, tells_of_use=tells_of_use)
            if request.method == "OPTIONS":
                request.answer_headers += self._origins.preflight(request.headers)
                await answer(request, send, 204, b"", "text/plain")
                return
            request.answer_headers += self._origins.check(request.headers)
            if reads and path.rstrip(b"/") in _PAGES:
                page, headers = chat_page()  # needs no key: the page tells nothing of this server
                request.answer_headers += headers
                await answer(request, send, 200, page, "text/html; charset=utf-8")
                return
            if path.rstrip(b"/") != b"/health":
                # The key is checked before the route: without a key nobody learns the routes.
                request.key, of_front = self._keys.check(request.headers)
                if of_front:
                    request.is_of_front()
                    self.connections.apart(scope["turbofit.connection"])
            route = request.route = find_route(request.method, path)
            if not await self._page(request, route, send):
                await self._serve(request, route, receive, send)
        except Refusal as refusal:
            await self._refuse(request, refusal, send)
        except asyncio.CancelledError:
            if not request.gone:  # the server ends
                raise
            self.metrics.count("disconnected_total")
            request.reason = "disconnected"
        except Exception as exc:  # noqa: BLE001 - a bug of ours must not end a request silently
            request.reason = f"bug: {type(exc).__name__}"
            await self._refuse(request, Refusal("internal"), send)
            # The loop's handler shows a traceback.
            bug = {"message": "a bug in turbofit's gateway", "exception": exc}
            asyncio.get_running_loop().call_exception_handler(bug)
        finally:
            self._record(request)

    async def _refuse(self, request: RequestContext, refusal: Refusal, send: Send) -> None:
        request.reason = request.reason or refusal.reason
        self.metrics.count("refused_total", f"reason={refusal.reason}")
        if not request.started:
            request.answer_headers += refusal.headers
            body = refusal_body(request.api, refusal, request.id)
            await answer(request, send, refusal.status, body, "application/json")


@contextmanager
def while_connected(receive: Receive, request: RequestContext) -> Iterator[None]:
    """Cancel the current task when the client of its request leaves."""
    task = asyncio.current_task()

    async def follow() -> None:
        await disconnected(receive)
        request.gone = True
        if task is not None:
            task.cancel()

    watch = asyncio.ensure_future(follow())
    try:
        yield
    finally:
        watch.cancel()


async def disconnected(receive: Receive) -> Message:
    """Wait until the client has left, and return ASGI's message about this."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message
