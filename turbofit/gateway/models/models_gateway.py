"""One address for several models: an ASGI app that hands each request to its model's gateway.

A request names its model. It waits here while the model's engines are asleep or start, for a time
that is stated; everything else (limits, images, retries, suspects) is that model's gateway's.
"""

from __future__ import annotations

import asyncio
from codecs import BOM_UTF8
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.process.log import LazyLogger
from turbofit.gateway.http.asgi_app import AsgiApp
from turbofit.gateway.http.body import Bodies
from turbofit.gateway.http.connections import Connections, Networks
from turbofit.gateway.http.guard import Keys, Origins
from turbofit.gateway.http.metrics import Metrics
from turbofit.gateway.http.model_names import no_such_model
from turbofit.gateway.http.pages import models_document
from turbofit.gateway.http.refusals import Refusal, ending
from turbofit.gateway.http.routes import find_route, is_health
from turbofit.gateway.models.model_pages import cards_of, health_document, metrics_text
from turbofit.gateway.routing.request_context import RequestContext, answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.asgi import Message, Receive, Send
    from turbofit.gateway.http.routes import Route
    from turbofit.gateway.limits.request_limits import Bounds
    from turbofit.gateway.models.served_model import ServedModel

__all__ = ["ModelsGateway"]

_LOG: Final = LazyLogger(__name__)


class _Named(msgspec.Struct):
    """The one field that is read here."""

    model: Any = None


class ModelsGateway(AsgiApp):
    """The app.

    Args:
        models: all that can be named, in the order in which they are listed.
        bounds: what requests of each model are held to by its first plan; of bodies only their
            size is looked at here.
        config: the public side; each model's gateway has the same keys.
        wait: seconds that a request waits at most for its model's start; 0 refuses at once.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        bounds: Sequence[Bounds],
        config: GatewayConfig,
        *,
        wait: float,
    ) -> None:
        largest = max(bounds, key=lambda one: one.limits.bytes_per_body)
        super().__init__(Metrics(), Origins(config.allow_origins), largest)
        self.models = {model.name: model for model in models}
        self._named_models = {name: model for model in models for name in model.names}
        self.config, self._wait = config, wait
        self.connections = Connections(
            config.connection, Networks(config.trusted_proxies), self.metrics.count
        )
        self._keys = Keys(config.api_keys, config.front_keys)
        self._bodies = Bodies(largest.limits.bytes_per_body, config)
        self._ending = False
        #: Whether those that start at once were ready.
        self.opened = False

    @property
    def bodies_in_memory(self) -> int:
        """Bytes of bodies that no model's gateway has yet."""
        return self._bodies.in_memory

    def end(self) -> None:
        """The server ends: nobody waits any longer. To be called in the loop."""
        self._ending = True
        for model in self.models.values():
            model.end()

    async def startup(self) -> None:
        """Nothing: each model's gateway starts when its engines are ready."""

    async def shutdown(self) -> None:
        """Close what the models' gateways hold open, and keep what they learned."""
        for model in self.models.values():
            gateway = model.gateway
            if gateway is not None:
                model.detach(gateway)
                await gateway.shutdown()

    async def _serve(
        self, request: RequestContext, path: bytes, scope: Message, receive: Receive, send: Send
    ) -> None:
        if not is_health(path):
            request.key = self._keys.check(request.headers)
            if self._keys.of_front(request.headers):
                request.is_of_front()
                self.connections.apart(scope["turbofit.connection"])
        elif self.config.api_keys:
            # Names and causes are for those who have a key.
            with suppress(Refusal):
                request.key = self._keys.check(request.headers)
        route = find_route(request.method, path)
        request.api = route.api
        if route.method != "POST":
            await self._page(request, route, send)
            return
        body = await self._bodies.read(request.headers, receive, request.who)
        model = self._find(body)
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await self._hand_over(model, request, body, (scope, gone, send))
        finally:
            gone.cancel()

    async def _hand_over(
        self,
        model: ServedModel,
        request: RequestContext,
        body: bytes,
        asgi: tuple[Message, asyncio.Future[Message], Send],
    ) -> None:
        """Wait until the model is ready, and let its gateway answer."""
        scope, gone, send = asgi
        self._bodies.keep(len(body), request.who)
        try:
            if self._ending and model.state != "ready":
                raise ending()
            gateway = await model.wait(self._wait, gone, self.config.queue_length)
        except asyncio.CancelledError:
            if not gone.done():
                raise
            self.metrics.count("disconnected_total")
            return
        finally:
            self._bodies.keep(-len(body), request.who)
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])
        del body

        async def replayed() -> Message:
            found = next(whole, None)
            return await asyncio.shield(gone) if found is None else found

        with model.request():
            await gateway(scope, replayed, send)

    def _find(self, body: bytes) -> ServedModel:
        """The model that a body names; the only one where it names none.

        Raises:
            Refusal: no JSON, or no such model.
        """
        try:
            name = msgspec.json.decode(body.removeprefix(BOM_UTF8), type=_Named).model
        except (msgspec.DecodeError, RecursionError) as exc:
            raise Refusal("invalid_json", exc=exc) from None
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        found = self._named_models.get(name) if isinstance(name, str) else None
        if found is not None:
            return found
        if name is None:
            known = ", ".join(self._named_models)
            raise Refusal("model_missing", known=known, param="model")
        raise no_such_model(name, self._named_models)

    async def _page(self, request: RequestContext, route: Route, send: Send) -> None:
        models = list(self.models.values())
        if route.kind == "health":
            known = bool(request.key) or not self.config.api_keys
            page = health_document(models, opened=self.opened, known=known)
            fine = page["status"] in ("healthy", "degraded")
            if not fine:
                seconds = min((model.retry_after for model in models), default=1)
                request.out.append((b"retry-after", str(seconds).encode()))
            body = msgspec.json.encode(page)
            await answer(request, send, 200 if fine else 503, body, "application/json")
        elif route.kind == "metrics":
            text = await metrics_text(models, self.metrics, self.config)
            kind = "text/plain; version=0.0.4; charset=utf-8"
            await answer(request, send, 200, text.encode(), kind)
        else:
            body = msgspec.json.encode(models_document(cards_of(models), route.api))
            await answer(request, send, 200, body, "application/json")


async def _disconnect(receive: Receive) -> Message:
    """The message that says that the client went away."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message
