"""A front before nodes that each run `turbofit serve`: it treats them as engines with a capacity.

Nodes hold requests to the plan. A front checks the key, chooses the node with the most capacity
left, and passes the answer on. It sends a request to another node if no engine has received it, and
once if the node itself broke off, but never if an engine ended with it. A node in doubt gets no new
requests until its health page says that it serves; the front reads that page each second.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, ClassVar, Final

import aiohttp
import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.json_types import Document
from turbofit.core.messages import PRETEND_HEADER
from turbofit.core.struct import Struct
from turbofit.gateway.http.asgi_app import AsgiApp, while_connected
from turbofit.gateway.http.refusals import Refusal, refusal_event
from turbofit.gateway.http.request_context import CLIENT, CLIENT_KEY, ForwardOutcome, sent_headers
from turbofit.gateway.upstream import Died, Unreachable, Upstream

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from aiohttp import ClientResponse

    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.request_context import Receive, RequestContext, Send
    from turbofit.gateway.http.routes import Route

_LOOK_SECONDS, _HEALTH_SECONDS = 1.0, 5.0
#: The most bytes of a body, until a node has said how many its plan allows.
_LARGEST: Final = 64 << 20
_MOST_NODES: Final = 16
#: Headers that are passed from a node's answer to the client.
_PASSED: Final = frozenset(
    {"content-type", "retry-after", "cache-control", "x-accel-buffering", "x-turbofit-limited"}
)
_DIED: Final = b'"engine_died"'
#: Error codes of a node if a request killed an engine: at its end, while it waits, once refused.
_SUSPECTED: Final = (_DIED, b'"suspect_waits"', b'"convicted"')
_MOST_SUSPECTS: Final = 4096
#: Fields of a node's health page that state its promise.
_PROMISE: Final = ("context", "images", "image_limit", "bytes_per_body")


class NodeAddress(Struct):
    """A node's address: its permanent name, its URL, and the key by which it trusts a front."""

    name: str
    url: str
    key: str | None = None
    draining: bool = False


def node_addresses(urls: Sequence[str], key: str | None) -> list[NodeAddress]:
    """Nodes at these URLs, all with the same key.

    Raises:
        UsageError: a text is no URL.
    """
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no address of a node", hint="write http://10.0.0.1:23333")
    return [NodeAddress(name=url.partition("//")[2], url=url, key=key) for url in urls]


class Node:
    """One node as a front knows it; ``capacity`` is the number of requests that it runs at once."""

    def __init__(self, address: NodeAddress) -> None:
        self.name, self.url, self.key = address.name, address.url.rstrip("/"), address.key
        self.draining = address.draining
        self.up, self.why, self.outstanding, self.capacity = False, "not asked yet", 0, 1.0
        self.about: Document = {}
        self.doubted = asyncio.Event()
        #: Whether it accepts the front's key, which its health page does not require.
        self.trusts = False

    @property
    def load(self) -> float:
        """The share of its capacity that is in use with one more request."""
        return (self.outstanding + 1) / self.capacity

    def doubt(self, why: str) -> None:
        """Send the node nothing until its health page says that it serves; read that page now."""
        self.up, self.why = False, why
        self.doubted.set()

    def heard(self, status: int, page: Document) -> None:
        self.about = page
        engines, up = page.get("engines") or 1, page.get("up") or 0
        self.up = status == 200 and not page.get("draining")
        self.why = "" if self.up else str(page.get("message") or page.get("status") or status)
        self.capacity = max(1e-3, (page.get("at_once") or 1) * up / engines)


class Front(AsgiApp):
    """The app of a front. ``source`` returns the current nodes; a thread calls it each second.

    ``tls`` is for nodes at https addresses, ``log`` receives a record of each request. A request
    with which an engine ended goes to that engine's node again while the node serves, until it is
    answered: the node's own deny list finds what ends engines, and refuses it. So no innocent
    request waits or is refused, but each node with a single engine may lose that engine.
    """

    #: Whether another node may have what one refuses because it is busy.
    retries: ClassVar = True

    def __init__(
        self,
        nodes: Sequence[NodeAddress],
        config: GatewayConfig,
        log: Callable[[Document], None] | None = None,
        source: Callable[[], Sequence[NodeAddress]] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(config, _LARGEST, log)
        self._upstream = Upstream(tls=tls)
        self._first_nodes, self._source = nodes, source
        #: Watching tasks by their nodes' names; the task that calls ``source`` has the name "".
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.nodes: dict[str, Node] = {}
        #: Names of nodes by the SHA-256 of a suspected request's body, the oldest first.
        self._suspects: dict[bytes, str] = {}

    async def startup(self) -> None:
        self.follow(self._first_nodes)
        if self._source is not None:
            self._tasks[""] = asyncio.ensure_future(self._look(self._source))

    async def shutdown(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await self._upstream.close()
        self._close_log()

    def follow(self, addresses: Sequence[NodeAddress]) -> None:
        """Send requests to these nodes only, from now on; call it in the front's loop.

        A node that is no longer among them finishes its requests.
        """
        before, self.nodes = self.nodes, {}
        for address in addresses:
            node = before.get(address.name)
            if node is None or (node.url, node.key) != (address.url.rstrip("/"), address.key):
                node = Node(address)
                self._unwatch(address.name)
                self._tasks[address.name] = asyncio.ensure_future(self._watch(node))
            node.draining = address.draining
            self.nodes[address.name] = node
        for name in before.keys() - self.nodes.keys():
            self._unwatch(name)

    def _unwatch(self, name: str) -> None:
        if name in self._tasks:
            self._tasks.pop(name).cancel()

    async def _look(self, source: Callable[[], Sequence[NodeAddress]]) -> None:
        while True:
            with suppress(Exception):  # Ray may be silent: the known nodes serve on
                addresses = await asyncio.get_running_loop().run_in_executor(None, source)
                if addresses:  # a new `serve` knows none yet: the old ones serve on
                    self.follow(addresses)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _watch(self, node: Node) -> None:
        """Read a node's health page each second, and immediately if it is in doubt."""
        while True:
            node.doubted.clear()
            try:
                status, page = await asyncio.wait_for(self._ask_health(node), _HEALTH_SECONDS)
                node.heard(status, page)
            except Exception as exc:  # noqa: BLE001 - the next look may be right
                node.up, node.why = False, str(exc) or "it does not answer"
            else:
                sizes = [known.about.get("bytes_per_body") or 0 for known in self.nodes.values()]
                self._bodies.limit(max(sizes, default=0) or _LARGEST)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(node.doubted.wait(), _LOOK_SECONDS)

    async def _ask_health(self, node: Node) -> tuple[int, Document]:
        if not node.trusts:
            (await self._open(node, "GET", "/about")).release()
            node.trusts = True
        async with await self._open(node, "GET", "/health") as response:
            return response.status, msgspec.json.decode(await response.read(), type=Document)

    async def _open(
        self, node: Node, method: str, path: str, body: bytes = b"", **headers: str
    ) -> ClientResponse:
        response = await self._upstream.open(node, method, path, body or None, headers)
        if response.status == 401:
            response.close()
            node.trusts = False
            raise Unreachable("it does not take the front's key")
        return response

    async def _serve(
        self, request: RequestContext, _: Route, /, receive: Receive, send: Send
    ) -> None:
        await self._bodies.take(request, receive)
        try:
            with while_connected(receive, request):
                await self._to_nodes(request, send)
        finally:
            self._bodies.forget(request)

    async def _to_nodes(self, request: RequestContext, send: Send) -> None:
        """Send a request to one node after another until one takes it; `Refusal` if none does."""
        avoid: list[Node] = []
        why, broke = Refusal("engine_unavailable:node", retry_after=5), False
        digest = sha256(request.body).digest() if request.body else b""
        first = self._suspects.get(digest, "")
        while (node := self._least_busy(avoid, first)) is not None and len(avoid) < _MOST_NODES:
            if avoid:
                self.metrics.count("retried_total")
            avoid.append(node)
            request.node, request.outcome = node.name, ForwardOutcome()
            node.outstanding += 1
            try:
                if await self._exchange(node, request, request.outcome, send):
                    self._suspects.pop(digest, None)
                return
            except _Full as exc:
                why = exc
            except Unreachable as exc:
                node.doubt(str(exc))
            except _Broke as exc:
                why = exc
                if broke:
                    break
                broke = True
            finally:
                node.outstanding -= 1
                if digest and request.outcome.suspected:
                    self._suspect(digest, node)
        raise why

    def _suspect(self, digest: bytes, node: Node) -> None:
        self._suspects.pop(digest, None)
        self._suspects[digest] = node.name
        if len(self._suspects) > _MOST_SUSPECTS:
            del self._suspects[next(iter(self._suspects))]

    def _least_busy(self, avoid: Sequence[Node], first: str) -> Node | None:
        ready = (n for n in self.nodes.values() if n.up and not n.draining and n not in avoid)
        return min(ready, key=lambda node: (node.name != first, node.load), default=None)

    async def _exchange(
        self, node: Node, request: RequestContext, outcome: ForwardOutcome, send: Send
    ) -> bool:
        """Send a request to a node and pass the answer on; returns whether it succeeded.

        Raises `Unreachable` if no engine received it, `_Full`, or `_Broke` if the node broke off
        before its answer began.
        """
        route = request.route
        assert route is not None
        response: ClientResponse | None = None
        # Headers that LMDeploy reads, and those that identify the client.
        whose = {CLIENT.decode(): request.client, CLIENT_KEY.decode(): request.key}
        try:
            response = await self._open(
                node, route.method, route.path, request.body, **whose, **sent_headers(request)
            )
            if response.status == 429 and self.retries:
                raise _Full(response)
            await self._pass_on(response, request, outcome, send)
        except (Died, aiohttp.ClientError, OSError) as exc:
            node.doubt(str(exc))
            self.metrics.count("engine_failures_total", f"engine={node.name}")
            outcome.suspected = True
            if not outcome.started:
                raise _Broke from None
            outcome.broken = True
            event = refusal_event(request.api, _Broke())
            await send({"type": "http.response.body", "body": event, "more_body": False})
        finally:
            if response is not None:
                # An unread answer closes the connection, which tells the node to stop.
                response.close() if not response.content.at_eof() else response.release()
        return outcome.status == 200 and not outcome.suspected

    async def _pass_on(
        self, response: ClientResponse, request: RequestContext, outcome: ForwardOutcome, send: Send
    ) -> None:
        """Pass a stream on as it comes, any other answer in one piece."""
        stream = response.content_type == "text/event-stream"
        ends = _SUSPECTED if response.status in (422, 503) else (_DIED,) if stream else ()
        data = await (response.content.readany() if stream else response.read())
        outcome.status, outcome.started = response.status, True
        outcome.first_byte = time.perf_counter()
        self.metrics.first_byte(outcome.first_byte - request.read)
        # A front of a pretend cluster adds that header itself to each answer.
        passed = _PASSED if self.config.pretend else _PASSED | {PRETEND_HEADER}
        request.out += [
            (name.lower().encode(), value.encode("latin-1", "replace"))
            for name, value in response.headers.items()
            if name.lower() in passed
        ]
        if not stream:
            request.out.append((b"content-length", b"%d" % len(data)))
        start = {"type": "http.response.start", "status": response.status}
        await send({**start, "headers": request.out})
        self._bodies.forget(request)  # it goes to no other node
        while data:
            if any(word in data for word in ends):  # before its client reads it, and leaves
                outcome.suspected, outcome.broken = True, stream
            outcome.bytes_out += len(data)
            await send({"type": "http.response.body", "body": data, "more_body": True})
            data = await response.content.readany()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _health(self, _: RequestContext, /) -> tuple[Document, int | None]:
        up = [node for node in self.nodes.values() if node.up and not node.draining]
        about = up[0].about if up else {}
        page: Document = {
            "status": "healthy" if up else "unavailable",
            "nodes": len(self.nodes), "up": len(up), "draining": self.connections.draining,
            "at_once": round(sum(node.capacity for node in up)),
            **{name: about[name] for name in _PROMISE if name in about},
        }  # fmt: skip
        return page, None if up else 5

    async def metrics_text(self) -> str:
        nodes = [((f"engine={node.name}",), node) for node in self.nodes.values()]
        return self.metrics.text(
            {
                "connections": [((), len(self.connections))],
                "in_flight": [(label, node.outstanding) for label, node in nodes],
                "engine_up": [(label, int(node.up)) for label, node in nodes],
            }
        )


class _Broke(Refusal):
    """A node broke off while it had a request, and reported no engine that ended."""

    def __init__(self) -> None:
        super().__init__("engine_died:node", retry_after=5)


class _Full(Refusal):
    """A node takes no more requests now."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        retry = response.headers.get("Retry-After", "")
        seconds = int(retry) if retry.isdigit() else 1
        super().__init__("busy:nodes", retry_after=seconds)
