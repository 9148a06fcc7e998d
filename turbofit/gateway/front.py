"""A front before nodes that each run `turbofit serve`: they are its engines, with a capacity.

Nodes hold requests to the plan. A front checks the key, chooses the node with the most capacity
left, and passes the answer on as a gateway does for an engine: only a request that no engine has
received goes to another node. A node in doubt gets no new requests until its health page says that
it serves; the front reads that page each second.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.json_types import Document
from turbofit.core.process.threads import in_thread
from turbofit.core.struct import Struct
from turbofit.gateway.http.asgi_app import AsgiApp, while_connected
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.deny_file import DenyFile
from turbofit.gateway.routing.deny_list import DenyList
from turbofit.gateway.routing.engines import Fleet, RoutedEngine
from turbofit.gateway.routing.request_forwarder import RequestForwarder
from turbofit.gateway.upstream import Upstream

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.request_context import Receive, RequestContext, Send
    from turbofit.gateway.http.routes import Route

_LOOK_SECONDS, _HEALTH_SECONDS = 1.0, 5.0
#: The most bytes of a body, until a node has said how many its plan allows.
_LARGEST: Final = 64 << 20
#: Fields of a node's health page that state its promise.
_PROMISE: Final = ("context", "images", "image_limit", "bytes_per_body")


class NodeAddress(Struct):
    """A node's address: its permanent name, its URL, and the key by which it trusts a front."""

    name: str
    url: str
    key: str | None = None


def node_addresses(urls: Sequence[str], key: str | None) -> list[NodeAddress]:
    """Nodes at these URLs, all with the same key.

    Raises:
        UsageError: a text is no URL.
    """
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no address of a node", hint="write http://10.0.0.1:23333")
    return [NodeAddress(name=url.partition("//")[2], url=url, key=key) for url in urls]


class Node(RoutedEngine):
    """A node as an engine of a front; its ``share`` is the number of requests it runs at once."""

    def __init__(self, address: NodeAddress) -> None:
        super().__init__(address.name, address.url, key=address.key)
        self.up, self.doubted = False, asyncio.Event()
        self.about: Document = {}

    def told(self, page: Document) -> None:
        """Note its health page, which is empty if the node is not to be used."""
        self.about, self.up = page, bool(page) and not page.get("draining")
        share = (page.get("at_once") or 1) * (page.get("up") or 0) / (page.get("engines") or 1)
        self.share = max(1e-3, share)


class Front(AsgiApp):
    """The app of a front. ``source`` returns the current nodes; a thread calls it each second.

    ``tls`` is for nodes at https addresses, ``log`` receives a record of each request.
    """

    def __init__(
        self,
        nodes: Sequence[NodeAddress],
        config: GatewayConfig,
        log: Callable[[Document], None] | None = None,
        source: Callable[[], Sequence[NodeAddress]] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(config, _LARGEST, log)
        self._first_nodes, self._source = nodes, source
        self._upstream, self.fleet = Upstream(tls=tls), Fleet(())
        self._forwarder = RequestForwarder(
            self.fleet, Admission(self.fleet), self._upstream, self, DenyList(DenyFile(None)),
            self._bodies, self.metrics, before_nodes=True,
        )  # fmt: skip
        #: The nodes with the tasks that watch them, and None with the one that calls ``source``.
        self._tasks: dict[Node | None, asyncio.Task[None]] = {}

    async def startup(self) -> None:
        self.follow(self._first_nodes)
        if self._source is not None:
            self._tasks[None] = asyncio.ensure_future(self._look(self._source))

    async def shutdown(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await self._upstream.close()
        self._close_log()

    def follow(self, addresses: Sequence[NodeAddress]) -> None:
        """Send requests to these nodes only, from now on; call it in the front's loop.

        A node that is no longer among them finishes its requests.
        """
        before = {(node.index, node.url, node.key): node for node in self._nodes}
        nodes = []
        for address in addresses:
            node = before.pop((address.name, address.url.rstrip("/"), address.key), None)
            if node is None:
                node = Node(address)
                self._tasks[node] = asyncio.ensure_future(self._watch(node))
            nodes.append(node)
        for node in before.values():
            self._tasks.pop(node).cancel()
        self.fleet.engines = tuple(nodes)

    @property
    def _nodes(self) -> list[Node]:
        return [node for node in self._tasks if node is not None]

    async def _look(self, source: Callable[[], Sequence[NodeAddress]]) -> None:
        while True:
            with suppress(Exception):  # Ray may be silent: the known nodes serve on
                if addresses := await in_thread(source):  # a run that begins knows none yet
                    self.follow(addresses)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _watch(self, node: Node) -> None:
        """Read a node's health page each second, and immediately if it is in doubt."""
        while True:
            node.doubted.clear()
            # Only the first page asks for the key.
            known = await self._upstream.page(node, "/about", _HEALTH_SECONDS)
            text = await self._upstream.page(node, "/health", _HEALTH_SECONDS) if known else ""
            page = Document()
            with suppress(msgspec.MsgspecError):
                page = msgspec.json.decode(text, type=Document)
            node.told(page)
            sizes = [other.about.get("bytes_per_body") or 0 for other in self._nodes]
            self._bodies.limit(max(sizes, default=0) or _LARGEST)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(node.doubted.wait(), _LOOK_SECONDS)

    def doubt(self, engine: RoutedEngine) -> None:
        """Send the node nothing new until its health page says that it serves."""
        engine.up = False
        self.suspect(engine)

    def suspect(self, engine: RoutedEngine) -> None:
        """Read the node's health page now."""
        if isinstance(engine, Node):
            engine.doubted.set()

    async def _serve(
        self, request: RequestContext, _: Route, /, receive: Receive, send: Send
    ) -> None:
        await self._bodies.take(request, receive)
        try:
            with while_connected(receive, request):
                await self._forwarder.forward(request, send)
        finally:
            self._bodies.forget(request)

    def _health(self, _: RequestContext, /) -> tuple[Document, int | None]:
        up = [node for node in self._nodes if node.up]
        about = up[0].about if up else {}
        page: Document = {
            "status": "healthy" if up else "unavailable",
            "nodes": len(self._nodes), "up": len(up), "draining": self.connections.draining,
            "at_once": round(sum(node.share for node in up)),
            **{name: about[name] for name in _PROMISE if name in about},
        }  # fmt: skip
        return page, None if up else 5

    async def metrics_text(self) -> str:
        nodes = [((f"engine={node.index}",), node) for node in self._nodes]
        return self.metrics.text(
            {
                "connections": [((), len(self.connections))],
                "in_flight": [(label, node.outstanding) for label, node in nodes],
                "engine_up": [(label, int(node.up)) for label, node in nodes],
            }
        )
