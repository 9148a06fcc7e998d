"""A front: a gateway that spreads requests over nodes, each of which runs `turbofit serve`.

The nodes hold requests to the plan. A front checks the key, chooses the node with the most free
capacity, and passes the answer on. A request goes to another node only if no engine has received
the request. A node that failed gets no new requests until its health page says that the node
serves. The front reads each health page twice a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Final

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.process.interpreter import in_daemon_thread
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import Document, Struct
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.first_tokens import FirstTokens
from turbofit.gateway.http.about import About, ModelFacts
from turbofit.gateway.http.asgi_app import AsgiApp, while_connected
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.request_context import Receive, RequestContext, Send
from turbofit.gateway.http.routes import Route, named_model, no_such_model
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.deny_list import DenyList
from turbofit.gateway.routing.engines import Fleet, RoutedEngine
from turbofit.gateway.routing.request_forwarder import RequestForwarder
from turbofit.gateway.upstream import Upstream, refuse_no_url

_LOG: Final = LazyLogger(__name__)

_LOOK_SECONDS, _HEALTH_SECONDS = 0.5, 5.0
#: The most bytes of a body, before the front knows the limit of any node.
_LARGEST: Final = 64 << 20
#: The largest number of engines, or of requests at once, that a valid health page has.
_MOST: Final = 1 << 20
_SILENT: Final = "does not answer"
#: What is wrong with a server that answers, but does not show its page ``/about``.
_CLOSED: Final = (
    "does not show its /about here: --upstream-key gives a server's key, and --allowed-hosts a"
    " server the name in its address"
)
#: What the front knows of a node whose page ``/about`` is missing or not readable.
_UNTOLD: Final = About(pretend=False, key=False, notices=(), models=())
#: Seconds after which a client should try again, while a server does not answer.
_RETRY: Final = 5


class NodeAddress(Struct):
    """A node's address: its permanent name, its URL, and the key of the fronts that it trusts."""

    name: str
    url: str
    key: str | None = None


def node_addresses(urls: Sequence[str], key: str | None) -> list[NodeAddress]:
    """Return the addresses of the nodes at ``urls``, all with the same ``key``.

    Raises:
        UsageError: a text is no URL.
    """
    refuse_no_url(urls, "a node", "http://10.0.0.1:23333")
    return [NodeAddress(name=url.partition("//")[2], url=url, key=key) for url in urls]


class HealthPage(Struct):
    """The fields of a node's page ``/health`` that a front reads, and their valid values."""

    draining: bool = False
    at_once: Annotated[float, Meta(ge=0, le=_MOST)] = 1
    up: Annotated[int, Meta(ge=0, le=_MOST)] = 0
    engines: Annotated[int, Meta(ge=0, le=_MOST)] = 1
    bytes_per_body: Annotated[int, Meta(ge=0, le=1 << 34)] = 0
    prefix_caching: bool = False


class Node(RoutedEngine):
    """A node of a cluster, which a front uses like an engine.

    Its ``share`` is the number of requests that the node runs at once.
    """

    watch: asyncio.Task[None]

    def __init__(self, address: NodeAddress) -> None:
        super().__init__(address.name, address.url, key=address.key)
        self.up = False
        #: Why the node gets no requests, as a clause without its subject; empty if the node serves.
        self.trouble = _SILENT
        #: The node's page ``/about`` when it was last read; `_UNTOLD` if it was not readable.
        self.about = _UNTOLD
        #: The most bytes of a body by the node's plan; 0 until its health page was read.
        self.bytes_per_body = 0


class Front(AsgiApp):
    """The app of a front, which spreads requests over nodes.

    ``source`` returns the addresses of the nodes. The front calls ``source`` in a thread twice a
    second, and can end during such a call. ``log`` receives a record of each request.
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
        admission = Admission(fleet, at_once=self.config.max_concurrent_requests)
        return RequestForwarder(
            fleet, admission, self._upstream, self.doubt, self.suspect, DenyList(),
            FirstTokens(self._upstream), self._bodies, self.metrics, before_nodes=True,
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
        """Keep the nodes up to date with the addresses that the source returns.

        A node that leaves the list finishes its requests. An empty list drops no node, since the
        list is also empty while a run begins.
        """
        while True:
            addresses: Sequence[NodeAddress] = ()
            with suppress(Exception):  # Ray may be silent; the known nodes continue
                found = in_daemon_thread(self._source, "addresses")
                addresses = await asyncio.wrap_future(found)
            gone = set(self.nodes) - set(addresses) if addresses else set()
            for address in gone:
                self.nodes.pop(address).watch.cancel()
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
            await self._read_pages(node)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _read_pages(self, node: Node) -> bool:
        """Read a node's pages, and note whether the node serves, and its requests at once.

        A node answers ``/about`` only with the right key, and under a name of its own; ``/health``
        needs neither. Return whether the node has answered ``/about``, with a page that is
        readable or not, and has a valid health page.
        """
        about = await self._upstream.page(node, "/about", _HEALTH_SECONDS)
        text = await self._upstream.page(node, "/health", _HEALTH_SECONDS)
        page, trouble = HealthPage(), ""
        if not about:
            trouble = _CLOSED
        if not text:
            trouble = _SILENT
        try:
            page = msgspec.json.decode(text or "{}", type=HealthPage)
        except (msgspec.MsgspecError, RecursionError) as exc:
            trouble, about = f"gives a health page that is not valid: {exc}", ""
        if page.draining:
            trouble = "ends"
        if trouble != node.trouble:
            _LOG.info("node %s %s", node.index, trouble or "serves")
        node.trouble, node.up, node.about = trouble, not trouble, _about_in(about)
        # How many requests the engines that are up serve at once; never 0, since `rank` divides by
        # this number.
        node.share = max(1e-3, (page.at_once or 1) * page.up / (page.engines or 1))
        node.prefix_caching = page.prefix_caching
        if text and about:
            node.bytes_per_body = page.bytes_per_body
            sizes = (each.bytes_per_body for each in self.nodes.values())
            self._bodies.limit(max(sizes, default=0) or _LARGEST)
        return bool(about)

    def doubt(self, engine: RoutedEngine) -> None:
        """Send a node no new requests until its health page says that the node serves."""
        engine.up = False
        if isinstance(engine, Node):
            engine.trouble = _SILENT

    def _pretends(self) -> bool:
        return any(node.about.pretend for node in self.nodes.values())

    def _waits(self) -> list[str]:
        return [f"{node.index} {node.trouble}" for node in self.nodes.values() if not node.up]

    def suspect(self, engine: RoutedEngine) -> None:
        """Do nothing: the node's next health page tells whether the node serves."""

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


def _about_in(text: str) -> About:
    """Return the page ``/about`` in a text; `_UNTOLD` if the text is empty or not readable."""
    try:
        return msgspec.json.decode(text, type=About)
    except (msgspec.MsgspecError, RecursionError):
        return _UNTOLD


def model_servers(texts: Sequence[str], keys: Sequence[str]) -> list[NodeAddress]:
    """Read the addresses of servers from texts ``NAME=URL``, and their keys from ``NAME=KEY``.

    A text ``KEY`` without the name of a server is the key of all servers that have no key of their
    own.

    Raises:
        UsageError: a text is no ``NAME=URL``, two names are equal, or two keys have no name.
    """
    pairs = [text.partition("=")[::2] for text in texts]
    names = [name for name, _ in pairs]
    for text, (name, url) in zip(texts, pairs, strict=True):
        if not name or not url.startswith(("http://", "https://")):
            raise UsageError(f"{text!r} is no NAME=URL", hint="write NAME=http://10.0.0.1:23333")
        if names.count(name) > 1:
            raise UsageError(
                f"two servers have the name {name}", hint="give --nodes the servers of one model"
            )
    own = dict(pair for key in keys if (pair := key.partition("=")[::2])[0] in names)
    rest = [key for key in keys if key.partition("=")[0] not in names]
    if len(rest) > 1:
        raise UsageError("two keys have no NAME=", hint="write --upstream-key NAME=KEY")
    common = next(iter(rest), None)
    return [NodeAddress(name=name, url=url, key=own.get(name, common)) for name, url in pairs]


class _OneServer(Fleet):
    """A fleet of one server with one model; a refusal names the model if the server is down."""

    def dead(self) -> Refusal:
        (node,) = self.engines
        trouble = node.trouble if isinstance(node, Node) else _SILENT
        return Refusal(
            "model_unavailable", why=f"the server of {node.index} {trouble}", retry_after=_RETRY
        )


class ModelsGateway(Front):
    """The app in front of servers of several models; each request goes to the server of its model.

    The name of each address in ``servers`` is the name of the model there. ``log`` receives a
    record of each request.
    """

    def __init__(
        self,
        servers: Sequence[NodeAddress],
        config: GatewayConfig,
        log: Callable[[Document], None] | None = None,
    ) -> None:
        super().__init__(lambda: servers, config, log)
        self._forwarders: dict[str, RequestForwarder] = {}

    @property
    def servers(self) -> dict[str, Node]:
        """The servers by the names of their models."""
        return {address.name: node for address, node in self.nodes.items()}

    async def startup(self) -> None:
        for address in self._source():
            fleet = _OneServer((self._add(address),))
            self._forwarders[address.name] = self._forwarder_to(fleet)
        await super().startup()

    async def _forward(self, request: RequestContext, send: Send) -> None:
        """Send a request to the server of its model."""
        name, servers = named_model(request.body), self.servers
        if name is None and len(servers) > 1:
            raise Refusal("model_missing", known=", ".join(servers), param="model")
        ours = next(iter(servers)) if name is None else str(name)
        node = servers.get(ours)
        if node is None:
            raise no_such_model(name, servers)
        if not node.up:
            node.up = await self._read_pages(node)
        await self._forwarders[ours].forward(request, send)

    def _names(self) -> dict[str, str]:
        return {name: name for name in self.servers}

    def _models(self) -> list[ModelFacts]:
        known = [(name, node.about.models) for name, node in self.servers.items()]
        return [replace(facts[0], name=name) for name, facts in known if facts]

    def _health(self, request: RequestContext, /) -> tuple[Document, int | None]:
        """Return the health page of a front, and the seconds until a retry if no server serves.

        If only some servers serve, the status is ``degraded``, and `/about` names the others.
        """
        page, retry = super()._health(request)
        if retry is None and page["up"] < len(self.nodes):
            page["status"] = "degraded"
        return page, retry
