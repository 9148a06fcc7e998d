"""Several servers at one address: a request goes to the server of its model.

Each server is a `turbofit serve`, which holds its requests to its plan and knows the model by that
name; nothing is held again here, and no body is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.gateway.front import Front, Node, NodeAddress
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import ModelCard, named_model, no_such_model
from turbofit.gateway.http.welcome import About, ModelFacts
from turbofit.gateway.routing.engines import Fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Document
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.request_context import RequestContext, Send
    from turbofit.gateway.routing.request_forwarder import RequestForwarder

#: Seconds after which a client should try again, while a server does not answer.
_RETRY: Final = 5


def model_servers(texts: Sequence[str], keys: Sequence[str]) -> list[NodeAddress]:
    """The servers that ``NAME=URL`` name; a key is ``NAME=KEY``, or ``KEY`` for all others.

    Raises:
        UsageError: a text is no ``NAME=URL``, or two have one name.
    """
    pairs = [text.partition("=")[::2] for text in texts]
    names = [name for name, _ in pairs]
    for name, url in pairs:
        if not name or not url.startswith(("http://", "https://")):
            raise UsageError(
                f"{name}={url} is no NAME=URL", hint="write NAME=http://10.0.0.1:23333"
            )
        if names.count(name) > 1:
            raise UsageError(f"{name} is named twice", hint="--nodes is for servers of one model")
    own = dict(pair for key in keys if (pair := key.partition("=")[::2])[0] in names)
    rest = [key for key in keys if key.partition("=")[0] not in names]
    if len(rest) > 1:
        raise UsageError("two keys name no model", hint="write --upstream-key NAME=KEY")
    common = next(iter(rest), None)
    return [NodeAddress(name=name, url=url, key=own.get(name, common)) for name, url in pairs]


class _OneServer(Fleet):
    """The server of one model, as a fleet whose refusal names it."""

    def dead(self) -> Refusal:
        why = f"the server of {self.engines[0].index} does not answer"
        return Refusal("model_unavailable", why=why, retry_after=_RETRY)


class ModelsGateway(Front):
    """The app; each of ``servers`` has the name of a model. ``log`` is as for a `Front`."""

    def __init__(
        self,
        servers: Sequence[NodeAddress],
        config: GatewayConfig,
        log: Callable[[Document], None] | None = None,
    ) -> None:
        super().__init__(lambda: servers, config, log)
        self._addresses = servers
        self._forwarders: dict[str, RequestForwarder] = {}

    @property
    def servers(self) -> dict[str, Node]:
        """The servers by the names of their models."""
        return {address.name: node for address, node in self.nodes.items()}

    async def startup(self) -> None:
        for address in self._addresses:
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
            await self._look(node)
            node.up = bool(node.about)  # a server that answers says itself why it does not serve
        await self._forwarders[ours].forward(request, send)

    def _cards(self) -> list[ModelCard]:
        return [ModelCard(name, name) for name in self.servers]

    def _models(self) -> list[ModelFacts]:
        known = [(name, facts_of(node)) for name, node in self.servers.items()]
        return [replace(facts[0], name=name) for name, facts in known if facts]

    def _waits(self) -> list[str]:
        return [f"{name}: it does not answer" for name, node in self.servers.items() if not node.up]

    def _health(self, request: RequestContext, /) -> tuple[Document, int | None]:
        """A front's page; ``degraded`` if some servers do not serve, whose names `/about` has."""
        page, retry = super()._health(request)
        if retry is None and page["up"] < len(self.nodes):
            page["status"] = "degraded"
        return page, retry


def facts_of(node: Node) -> tuple[ModelFacts, ...]:
    """The models of a server, its own first, by its page ``/about``; empty if it has none."""
    try:
        return msgspec.json.decode(node.about, type=About).models
    except msgspec.MsgspecError:
        return ()
