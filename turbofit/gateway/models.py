"""Several servers at one address: a request goes to the server of its model.

Each server is a `turbofit serve`, which holds its requests to its plan; nothing is held again here,
and a body is not changed but for the model's name.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.process.threads import in_thread
from turbofit.gateway.front import Front, NodeAddress
from turbofit.gateway.http.body import LARGE
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.request_context import ForwardOutcome
from turbofit.gateway.http.routes import ModelCard, named_model, no_such_model
from turbofit.gateway.http.welcome import About, ModelFacts
from turbofit.gateway.upstream import Died, Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Document
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.front import Node
    from turbofit.gateway.http.request_context import RequestContext, Send

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


class ModelsGateway(Front):
    """The app; each of ``servers`` has the name of a model. ``log`` is as for a `Front`."""

    retries: ClassVar = False

    def __init__(
        self,
        servers: Sequence[NodeAddress],
        config: GatewayConfig,
        log: Callable[[Document], None] | None = None,
    ) -> None:
        super().__init__(servers, config, log)
        #: What each server says of its models, by our name for it; the first one is its own.
        self._facts: dict[str, tuple[ModelFacts, ...]] = {}

    async def _to_nodes(self, request: RequestContext, send: Send) -> None:
        """Send a request to the server of its model, whatever its health page says."""
        name = named_model(request.body)
        if name is None and len(self.nodes) > 1:
            raise Refusal("model_missing", known=", ".join(self.nodes), param="model")
        node = self.nodes.get(next(iter(self.nodes)) if name is None else str(name))
        if node is None:
            raise no_such_model(name, self.nodes)
        request.node, request.outcome = node.name, ForwardOutcome()
        node.outstanding += 1
        try:
            if node.name not in self._facts:  # it has not answered yet
                await self._ask_health(node)
            known = [facts.name for facts in self._facts[node.name]]
            if known and name not in known:
                rename = partial(renamed, request.body, known[0])
                large = request.bytes_in >= LARGE
                request.body = await in_thread(rename) if large else rename()
            await self._exchange(node, request, request.outcome, send)
        except (Unreachable, Died) as exc:
            node.doubt(str(exc))
            why = f"the server of {node.name} does not answer"
            raise Refusal("model_unavailable", why=why, retry_after=_RETRY) from None
        finally:
            node.outstanding -= 1

    async def _ask_health(self, node: Node) -> tuple[int, Document]:
        if not node.up:  # it may be another server by now
            async with await self._open(node, "GET", "/about") as response:
                try:
                    about = msgspec.json.decode(await response.read(), type=About)
                except msgspec.MsgspecError:
                    raise Unreachable("it is no turbofit serve") from None
            self._facts[node.name] = about.models
            node.trusts = True
        return await super()._ask_health(node)

    def _cards(self) -> list[ModelCard]:
        return [ModelCard(name, name) for name in self.nodes]

    def _models(self) -> list[ModelFacts]:
        known = [(name, self._facts.get(name)) for name in self.nodes]
        return [replace(facts[0], name=name) for name, facts in known if facts]

    def _waits(self) -> list[str]:
        return [f"{node.name}: {node.why}" for node in self.nodes.values() if not node.up]

    def _health(self, request: RequestContext, /) -> tuple[Document, int | None]:
        """``degraded`` if some servers do not serve; their names are for clients with a key."""
        up = [node.name for node in self.nodes.values() if node.up]
        status = "healthy" if len(up) == len(self.nodes) else "degraded" if up else "unavailable"
        models: Any = len(self.nodes)
        with suppress(Refusal):
            if not self.config.api_keys or self._keys.check(request.headers)[0]:
                models = {node.name: node.why or "healthy" for node in self.nodes.values()}
        page = {"status": status, "draining": self.connections.draining, "up": len(up)}
        return {**page, "models": models}, None if up else _RETRY


def renamed(body: bytes, name: str) -> bytes:
    """The body of a request, with another name of its model."""
    fields = msgspec.json.decode(body.removeprefix(BOM_UTF8), type=dict[str, msgspec.Raw])
    fields["model"] = msgspec.Raw(msgspec.json.encode(name))
    return msgspec.json.encode(fields)
