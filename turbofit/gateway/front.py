"""A front before nodes that each run `turbofit serve`: they are its engines, with a capacity.

Nodes hold requests to the plan. A front checks the key, chooses the node with the most capacity
left, and passes the answer on as a gateway does for an engine: only a request that no engine has
received goes to another node. A node in doubt gets no new requests until its health page says that
it serves; the front reads that page twice a second.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.core.json_types import Document
from turbofit.core.process.threads import in_thread
from turbofit.core.struct import Struct
from turbofit.gateway.http.asgi_app import AsgiApp, while_connected
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.deny_list import DenyList
from turbofit.gateway.routing.engines import Fleet, RoutedEngine
from turbofit.gateway.routing.request_forwarder import RequestForwarder
from turbofit.gateway.upstream import Upstream, refuse_no_url

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.request_context import Receive, RequestContext, Send
    from turbofit.gateway.http.routes import Route

_LOOK_SECONDS, _HEALTH_SECONDS = 0.5, 5.0
#: The most bytes of a body, until a node has said how many its plan allows.
_LARGEST: Final = 64 << 20


class NodeAddress(Struct):
    """A node's address: its permanent name, its URL, and the key by which it trusts a front."""

    name: str
    url: str
    key: str | None = None


def node_addresses(urls: Sequence[str], key: str | None) -> list[NodeAddress]:
    """Nodes at these URLs, all with the same key; a `UsageError` if a text is no URL."""
    refuse_no_url(urls, "a node", "http://10.0.0.1:23333")
    return [NodeAddress(name=url.partition("//")[2], url=url, key=key) for url in urls]


class Node(RoutedEngine):
    """A node as an engine of a front; its ``share`` is the number of requests it runs at once."""

    watch: asyncio.Task[None]

    def __init__(self, address: NodeAddress) -> None:
        super().__init__(address.name, address.url, key=address.key)
        self.up = False
        #: What its page ``/about`` said last.
        self.about = ""
        #: The most bytes of a body by its plan; 0 until it has said so.
        self.bytes_per_body = 0


class Front(AsgiApp):
    """The app of a front before the nodes that ``source`` returns; a thread calls it regularly.

    ``log`` receives a record of each request.
    """

    def __init__(
        self,
        source: Callable[[], Sequence[NodeAddress]],
        config: GatewayConfig,
        log: Callable[[Document], None] | None = None,
    ) -> None:
        super().__init__(config, _LARGEST, log)
        self._source, self._upstream, self.fleet = source, Upstream(), Fleet(())
        self.nodes: dict[NodeAddress, Node] = {}
        self._forwarder = self._forwarder_to(self.fleet)

    def _forwarder_to(self, fleet: Fleet) -> RequestForwarder:
        return RequestForwarder(
            fleet, Admission(fleet), self._upstream, self, DenyList(), self._bodies,
            self.metrics, before_nodes=True,
        )  # fmt: skip

    async def startup(self) -> None:
        self._following = asyncio.ensure_future(self._follow())

    async def shutdown(self) -> None:
        tasks = (self._following, *(node.watch for node in self.nodes.values()))
        for task in tasks:
            task.cancel()
        await self._upstream.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_log()

    async def _follow(self) -> None:
        """Send requests to the nodes of the source; others finish those that they have."""
        while True:
            addresses: Sequence[NodeAddress] = ()
            with suppress(Exception):  # Ray may be silent: the known nodes serve on
                addresses = await in_thread(self._source)
            for address in set(self.nodes) - set(addresses) if addresses else ():
                self.nodes.pop(address).watch.cancel()  # a run that begins knows none yet
            for address in addresses:
                if address not in self.nodes:
                    self._add(address)
            self.fleet.engines = tuple(self.nodes.values())
            await asyncio.sleep(_LOOK_SECONDS)

    def _add(self, address: NodeAddress) -> Node:
        node = self.nodes[address] = Node(address)
        node.watch = asyncio.ensure_future(self._watch(node))
        return node

    async def _watch(self, node: Node) -> None:
        """Read a node's pages twice a second."""
        while True:
            await self._look(node)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look(self, node: Node) -> None:
        """Read a node's pages: ``/about`` wants the key, which ``/health`` does not."""
        node.about = await self._upstream.page(node, "/about", _HEALTH_SECONDS)
        text = await self._upstream.page(node, "/health", _HEALTH_SECONDS) if node.about else ""
        page: Document = {}
        with suppress(msgspec.MsgspecError):
            page = msgspec.json.decode(text, type=Document)
        node.up = bool(page) and not page.get("draining")
        share = (page.get("at_once") or 1) * (page.get("up") or 0) / (page.get("engines") or 1)
        node.share = max(1e-3, share)
        if page:
            node.bytes_per_body = page.get("bytes_per_body") or 0
            sizes = (each.bytes_per_body for each in self.nodes.values())
            self._bodies.limit(max(sizes, default=0) or _LARGEST)

    def doubt(self, engine: RoutedEngine) -> None:
        """Send the node nothing new until its health page says that it serves."""
        engine.up = False

    def suspect(self, engine: RoutedEngine) -> None:
        """Do nothing: the node's next health page says how it is."""

    async def _serve(
        self, request: RequestContext, _: Route, /, receive: Receive, send: Send
    ) -> None:
        await self._bodies.take(request, receive)
        try:
            with while_connected(receive, request):
                await self._forward(request, send)
        finally:
            self._bodies.forget(request)

    async def _forward(self, request: RequestContext, send: Send) -> None:
        await self._forwarder.forward(request, send)

    def _health(self, _: RequestContext, /) -> tuple[Document, int | None]:
        up = [node for node in self.nodes.values() if node.up]
        page: Document = {
            "status": "healthy" if up else "unavailable",
            "nodes": len(self.nodes), "up": len(up), "draining": self.connections.draining,
            "at_once": round(sum(node.share for node in up)),
        }  # fmt: skip
        return page, None if up else 5

    async def metrics_text(self) -> str:
        nodes = [((f"engine={node.index}",), node) for node in self.nodes.values()]
        return self.metrics.text(
            {
                "connections": [((), len(self.connections))],
                "in_flight": [(label, node.outstanding) for label, node in nodes],
                "engine_up": [(label, int(node.up)) for label, node in nodes],
            }
        )
