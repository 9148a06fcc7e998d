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
from turbofit.gateway.http.asgi_app import METRICS_TYPE, AsgiApp, disconnected
from turbofit.gateway.http.metrics import DROPPED, logs_text, merge
from turbofit.gateway.http.model_names import ModelCard, models_document, no_such_model
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.request_context import RequestContext, answer
from turbofit.gateway.http.welcome import limits_in_words
from turbofit.gateway.routing.health import healthy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Document
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.request_context import Message, Receive, Send
    from turbofit.gateway.http.routes import Route
    from turbofit.gateway.limits.request_limits import Bounds
    from turbofit.gateway.models.served_model import ServedModel

__all__ = ["ModelsGateway"]

_LOG: Final = LazyLogger(__name__)

_OUR_METRICS: Final[tuple[tuple[str, str, str, Callable[[ServedModel], float | None]], ...]] = (
    ("model_ready", "gauge", "Whether a model's engines are ready.",
     lambda model: model.state == "ready"),
    ("model_waiting", "gauge", "Requests that wait for a model's start.",
     lambda model: len(model.waiting)),
    ("model_in_flight", "gauge", "Requests that a model's gateway has.",
     lambda model: model.in_flight),
    ("model_starts_total", "counter", "Starts of a model that became ready.",
     lambda model: model.starts),
    ("model_start_seconds", "gauge", "What a model's last start took.",
     lambda model: model.start_seconds),
)  # fmt: skip


class _Named(msgspec.Struct):
    """The one field that is read here."""

    model: Any = None


class ModelsGateway(AsgiApp):
    """The app; each model's gateway has the same keys.

    ``bounds`` are what requests of each model are held to by its first plan; of bodies only their
    size is looked at here. ``wait``: seconds that a request waits at most for its model's start; 0
    refuses at once.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        bounds: Sequence[Bounds],
        config: GatewayConfig,
        *,
        wait: float,
    ) -> None:
        super().__init__(config, max(one.limits.bytes_per_body for one in bounds))
        self.models = {model.name: model for model in models}
        self._limits = [limits_in_words(one) + config.defaults.words for one in bounds]
        self._named_models = {name: model for model in models for name in model.names}
        self._wait = wait
        #: Whether those that start at once were ready.
        self.opened = False

    def end(self) -> None:
        """The server ends: nobody waits any longer. To be called in the loop."""
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
        self, request: RequestContext, route: Route, receive: Receive, send: Send
    ) -> None:
        if route.method != "POST":
            await self._page(request, route, send)
            return
        body = await self._bodies.read(request.headers, receive, request.who)
        model = self._find(body)
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await self._hand_over(model, request, body, gone, send)
        finally:
            gone.cancel()

    def _models(self) -> dict[str, list[str]]:
        return dict(zip(self.models, self._limits, strict=True))

    async def _hand_over(
        self,
        model: ServedModel,
        request: RequestContext,
        body: bytes,
        gone: asyncio.Future[Message],
        send: Send,
    ) -> None:
        """Wait until the model is ready, and let its gateway answer."""
        self._bodies.keep(len(body), request.who)
        try:
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
            await gateway(request.scope, replayed, send)

    def _find(self, body: bytes) -> ServedModel:
        """The model that a body names; the only one where it names none."""
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
            known = not self.config.api_keys
            if not known:  # names and causes are for those who have a key
                with suppress(Refusal):
                    known = bool(self._keys.check(request.headers)[0])
            page = health_document(models, opened=self.opened, known=known)
            retry = min((model.retry_after for model in models), default=1)
            fine = page["status"] in ("healthy", "degraded")
            await self._answer_health(request, send, page, None if fine else retry)
        elif route.kind == "metrics":
            text = await self._metrics_text(models)
            await answer(request, send, 200, text.encode(), METRICS_TYPE)
        else:
            cards = [ModelCard(name, one.name, _facts(one)) for one in models for name in one.names]
            body = msgspec.json.encode(models_document(cards, route.api))
            await answer(request, send, 200, body, "application/json")

    async def _metrics_text(self, models: Sequence[ServedModel]) -> str:
        """Each model's page with a label ``model``, and this address's numbers."""

        async def page(model: ServedModel) -> str:
            text = "" if model.gateway is None else await model.gateway.metrics_text()
            return text.partition(f"# HELP {DROPPED}")[0]

        pages = await asyncio.gather(*map(page, models))
        lines = []
        for name, kind, explained, number in _OUR_METRICS:
            full = f"turbofit_{name}"
            lines += [f"# HELP {full} {explained}", f"# TYPE {full} {kind}"]
            for model in models:
                value = number(model)
                if value is not None:
                    lines.append(f'{full}{{model="{model.name}"}} {value:g}')
        named: dict[int | str, str] = dict(zip(self.models, pages, strict=True))
        # An empty label is none: what is refused before a model is known.
        ours = merge({**named, "": self.metrics.text({})}, "model")
        return ours + "\n".join(lines) + "\n" + logs_text()


def _fine(model: ServedModel) -> bool:
    """Whether a request for it is answered, after a start where its engines do not run."""
    if model.state == "ready":
        return model.gateway is not None and healthy(model.gateway.fleet)
    return model.state != "failed" or model.rested


def _facts(model: ServedModel) -> Document:
    """Where one model stands."""
    unanswered = model.state == "ready" and not _fine(model)
    facts: dict[str, Any] = {
        "state": "unavailable" if unanswered else model.state, "waiting": len(model.waiting),
    }  # fmt: skip
    if model.expected is not None:
        facts["start_seconds"] = round(model.expected, 1)
    if model.state not in ("ready", "asleep"):
        facts.update(message=model.status, retry_after=model.retry_after)
    return facts


def health_document(models: Sequence[ServedModel], *, opened: bool, known: bool) -> Document:
    """``healthy``, ``degraded`` where some models do not answer, ``starting`` or ``unavailable``.

    A model that sleeps is well: it starts when it is asked for.

    Args:
        models: all of them.
        opened: whether those that start at once were ready.
        known: whether the client may learn which models there are, and why one does not start.
    """
    fine = [_fine(model) for model in models]
    status = "healthy" if all(fine) else "degraded" if any(fine) else "unavailable"
    if not opened:
        status = "starting"
    if not known:
        return {"status": status, "models": len(models), "up": sum(fine)}
    return {"status": status, "models": {model.name: _facts(model) for model in models}}
