"""One address for several models: an ASGI app that passes each request to its model's gateway.

A request waits here while its model's engines are asleep or start; the model's own gateway does
everything else (limits, images, retries, suspects). A `ServedModel` belongs to the event loop of
the address; other threads only read numbers. A supervisor has an `AttachedGateway`, which takes the
place of a `GatewayThread`.
"""

from __future__ import annotations

import asyncio
import time
from codecs import BOM_UTF8
from contextlib import contextmanager, suppress
from math import ceil
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec

from turbofit.core.errors import LaunchError
from turbofit.gateway.http.asgi_app import AsgiApp, disconnected
from turbofit.gateway.http.metrics import merge
from turbofit.gateway.http.refusals import Refusal, ending
from turbofit.gateway.http.request_context import RequestContext
from turbofit.gateway.http.routes import ModelCard, no_such_model
from turbofit.gateway.http.welcome import ModelFacts, facts_of
from turbofit.gateway.routing.health import healthy, trouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from turbofit.core.json_types import Document
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.http.request_context import Message, Receive, Send
    from turbofit.gateway.http.routes import Route
    from turbofit.gateway.limits.request_limits import Bounds
    from turbofit.gateway.server import GatewayThread

_Answer = TypeVar("_Answer")
_App = TypeVar("_App", bound=AsgiApp)

#: In ``ending``, running requests may finish, and new ones wait for the next start.
ModelState = Literal["asleep", "starting", "ready", "ending", "failed"]

#: Seconds after which a client should try again, if no start was measured yet.
_RETRY: Final = 10
_LOOK: Final = 0.05
#: Seconds for which a loop may be busy: a server that waits longer hears no signal.
_BUSY_SECONDS: Final = 60.0
#: Seconds for the requests of engines that have ended: each ends when its connection breaks.
_BROKEN_OFF: Final = 60.0


class ServedModel:
    """A model that clients can name, whether its engines run or not."""

    def __init__(self, name: str, names: Sequence[str] = ()) -> None:
        self.name = name
        #: All names that clients may use for it, beside the other models of its address.
        self.names = tuple(dict.fromkeys((name, *names)))
        self.gateway: Gateway | None = None
        self.state: ModelState = "asleep"
        #: The number of requests at its gateway.
        self.in_flight = 0
        #: The number of requests that wait for its start.
        self.waiting = 0
        #: Wakes the waiting requests; each then checks whether it must wait on.
        self._changed = asyncio.Event()
        #: Whether the server is ending.
        self._ended = False
        #: When it began to start, when it became ready, and when its last request ended.
        self.began_at = self.ready_at = self.used_at = time.monotonic()
        #: The number of starts that became ready, and the seconds of the last one.
        self.starts = 0
        self.start_seconds: float | None = None
        #: When a client first wanted the model while it was not ready: one that waits, or one that
        #: was refused because none may wait. None if no client wants it.
        self.wanted_since: float | None = None
        #: Why it does not start, and the time before which it is not started again.
        self.trouble, self.again_at = "", 0.0

    @property
    def idle(self) -> float:
        """Seconds without a request."""
        if self.in_flight or self.waiting:
            return 0.0
        return time.monotonic() - max(self.used_at, self.ready_at)

    @property
    def rested(self) -> bool:
        """Whether the model may be started, also after a failed start."""
        return self.state == "asleep" or (
            self.state == "failed" and time.monotonic() >= self.again_at
        )

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a request is expected to find the model ready."""
        if self.state == "failed":
            return max(1, ceil(self.again_at - time.monotonic()))
        if self.start_seconds is None:
            return _RETRY
        spent = time.monotonic() - self.began_at if self.state == "starting" else 0.0
        return max(1, ceil(self.start_seconds - spent))

    @property
    def status(self) -> str:
        if self.state == "failed":
            return f"{self.name} does not start: {self.trouble}"
        took = self.start_seconds
        known = "" if took is None else f"; a start takes about {ceil(took)} s"
        if known and self.state == "starting":
            known += f", {self.retry_after} s are left"
        doing = {"asleep": "is asleep", "ending": "gives its memory back"}
        return f"{self.name} {doing.get(self.state, f'is {self.state}')}{known}"

    # Steps of the supervisor that starts and ends its engines.

    def begin(self) -> None:
        self.state, self.began_at, self.trouble = "starting", time.monotonic(), ""

    def open(self, gateway: Gateway) -> None:
        """Note that its engines are ready behind this gateway."""
        now = time.monotonic()
        if self.state == "starting":
            self.starts, self.start_seconds = self.starts + 1, now - self.began_at
        self.gateway, self.state, self.ready_at = gateway, "ready", now
        self._wake()

    def close(self) -> None:
        """Let the gateway's requests finish; new requests wait."""
        if self.state == "ready":
            self.state = "ending"

    def close_idle(self, seconds: float) -> bool:
        """Close the model if it had no request for ``seconds``; returns whether it is closing."""
        if self.state == "ready" and self.idle >= seconds:
            self.close()
        return self.state == "ending"

    def detach(self, gateway: Gateway) -> None:
        """Note that its gateway takes no more requests."""
        if self.gateway is gateway:
            self.gateway = None
            if self.state == "ready":
                self.begin()  # it starts again, unless it is told to end

    def sleep(self) -> None:
        """Note that its engines have ended and given their memory back."""
        self.gateway, self.state = None, "asleep"

    def fail(self, trouble: str, again_at: float) -> None:
        """Note a failed start and tell waiting clients; no start is tried before ``again_at``."""
        self.gateway, self.state = None, "failed"
        self.trouble, self.again_at = trouble, again_at
        self._wake()

    def end(self) -> None:
        """Tell waiting clients that the server ends."""
        self._ended = True
        self._wake()

    # Requests.

    @contextmanager
    def request(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self.used_at = time.monotonic()

    def refusal(self) -> Refusal:
        reason = "model_unavailable" if self.state == "failed" else "model_starting"
        return Refusal(reason, why=self.status, retry_after=self.retry_after)

    async def wait(self, seconds: float, gone: asyncio.Future[Any], longest: int) -> Gateway:
        """Return the model's gateway once it is ready, within ``seconds``; 0 refuses immediately.

        ``gone`` is done when the client has left, which cancels the wait; at most ``longest``
        requests may wait.

        Raises:
            Refusal: too many requests wait, the time is over, the model cannot start, or the
                server ends.
            asyncio.CancelledError: the client has left.
        """
        came = time.monotonic()
        while self.state != "ready" or self.gateway is None:
            left = came + seconds - time.monotonic()
            if self._ended:
                raise ending()
            if self.state == "failed" and not self.rested:
                raise self.refusal()
            if seconds and left <= 0:
                raise self.refusal()
            if self.waiting >= longest:
                again = self.retry_after
                raise Refusal("busy:model", count=longest, name=self.name, retry_after=again)
            if self.wanted_since is None:
                self.wanted_since = came
            if not seconds:
                raise self.refusal()
            self.waiting += 1
            change: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait((change, gone), timeout=left, return_when="FIRST_COMPLETED")
            finally:
                self.waiting -= 1
                if not self.waiting:
                    self.wanted_since = None
                change.cancel()
            if gone.done():
                raise asyncio.CancelledError
        return self.gateway

    def _wake(self) -> None:
        self.wanted_since = None
        self._changed.set()
        self._changed = asyncio.Event()


_OUR_METRICS: Final[tuple[tuple[str, str, str, Callable[[ServedModel], float | None]], ...]] = (
    ("model_ready", "gauge", "Whether a model's engines are ready.",
     lambda model: model.state == "ready"),
    ("model_waiting", "gauge", "Requests that wait for a model's start.",
     lambda model: model.waiting),
    ("model_in_flight", "gauge", "Requests that a model's gateway has.",
     lambda model: model.in_flight),
    ("model_starts_total", "counter", "Starts of a model that became ready.",
     lambda model: model.starts),
    ("model_start_seconds", "gauge", "What a model's last start took.",
     lambda model: model.start_seconds),
)  # fmt: skip


class _Named(msgspec.Struct):
    model: Any = None


class ModelsGateway(AsgiApp):
    """The app of the address; each model's gateway has the same keys.

    ``bounds`` are the limits of each model's first plan; only their limit on a body's size is used
    here. ``wait``: see `ServedModel.wait`.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        bounds: Sequence[Bounds],
        config: GatewayConfig,
        *,
        wait: float,
    ) -> None:
        super().__init__(config, max(of_model.limits.bytes_per_body for of_model in bounds))
        self.models = {model.name: model for model in models}
        self._bounds = tuple(bounds)
        self._named_models = {name: model for model in models for name in model.names}
        self._wait = wait
        #: Whether the models that start first have been ready.
        self.opened = False

    def end(self) -> None:
        """Let no request wait any longer. Call it in the loop."""
        for model in self.models.values():
            model.end()

    async def shutdown(self) -> None:
        for model in self.models.values():
            gateway = model.gateway
            if gateway is not None:
                model.detach(gateway)
                await gateway.shutdown()

    async def _serve(
        self, request: RequestContext, _: Route, /, receive: Receive, send: Send
    ) -> None:
        """Wait until the model is ready, and let its gateway answer."""
        await self._bodies.take(request, receive)
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            model = self._find(request.body)
            gateway = await model.wait(self._wait, gone, self.config.queue_length)
            whole = iter([{"type": "http.request", "body": request.body, "more_body": False}])
            self._bodies.forget(request)  # its gateway counts it now

            async def replayed() -> Message:
                message = next(whole, None)
                return await asyncio.shield(gone) if message is None else message

            with model.request():
                await gateway(request.scope, replayed, send)
        finally:
            request.gone = gone.done()
            gone.cancel()
            self._bodies.forget(request)

    def _record(self, request: RequestContext) -> None:
        """Each model's gateway keeps a record of its own requests."""

    def _models(self) -> list[ModelFacts]:
        facts = list[ModelFacts]()
        for model, bounds in zip(self.models.values(), self._bounds, strict=True):
            memory = () if model.gateway is None else model.gateway.config.memory
            facts += facts_of([model.name], bounds, self.config.defaults.words, memory)
        return facts

    def _waiting(self) -> int:
        models = self.models.values()
        at_engines = (model.gateway.admission.waiting for model in models if model.gateway)
        return sum(model.waiting for model in models) + sum(at_engines)

    def _waits(self) -> list[str]:
        return [model.status for model in self.models.values() if model.state != "ready"]

    def _find(self, body: bytes) -> ServedModel:
        """The model that a body names; without a name, the only model."""
        try:
            name = msgspec.json.decode(body.removeprefix(BOM_UTF8), type=_Named).model
        except (msgspec.DecodeError, RecursionError) as exc:
            raise Refusal("invalid_json", exc=exc) from None
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        model = self._named_models.get(name) if isinstance(name, str) else None
        if model is not None:
            return model
        if name is None:
            known = ", ".join(self._named_models)
            raise Refusal("model_missing", known=known, param="model")
        raise no_such_model(name, self._named_models)

    def _cards(self) -> list[ModelCard]:
        return [
            ModelCard(name, model.name, {"turbofit": _facts(model)})
            for model in self.models.values()
            for name in model.names
        ]

    def _health(self, request: RequestContext, /) -> tuple[Document, int | None]:
        models = list(self.models.values())
        known = not self.config.api_keys
        if not known:  # names and causes are only for clients with a key
            with suppress(Refusal):
                known = bool(self._keys.check(request.headers)[0])
        page = health_document(models, opened=self.opened, known=known)
        fine = page["status"] in ("healthy", "degraded")
        return page, None if fine else min((model.retry_after for model in models), default=1)

    async def metrics_text(self) -> str:
        """The metrics of each model, with a label ``model``, and those of the shared address."""

        async def page(model: ServedModel) -> str:
            return "" if model.gateway is None else await model.gateway.metrics_text()

        models = list(self.models.values())
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
        # An empty label counts as no label: for requests refused before their model is known.
        ours = merge({**named, "": self.metrics.text({})}, "model")
        return ours + "\n".join(lines) + "\n"


def _fine(model: ServedModel) -> bool:
    """Whether a request for the model would be answered, after a start if its engines are down."""
    if model.state == "ready":
        return model.gateway is not None and healthy(model.gateway.fleet)
    return model.state != "failed" or model.rested


def _facts(model: ServedModel) -> Document:
    facts: dict[str, Any] = {"state": model.state, "waiting": model.waiting}
    if model.state == "ready" and not _fine(model):
        outage = None if model.gateway is None else model.gateway.fleet.outage
        facts.update(trouble(outage, "state"))
    if model.start_seconds is not None:
        facts["start_seconds"] = round(model.start_seconds, 1)
    if model.state not in ("ready", "asleep"):
        facts.update(message=model.status, retry_after=model.retry_after)
    return facts


def health_document(models: Sequence[ServedModel], *, opened: bool, known: bool) -> Document:
    """The status: ``healthy``, ``degraded`` if some models fail, ``starting`` or ``unavailable``.

    A model that sleeps is healthy. ``opened``: whether the models that start first were ready;
    ``known``: whether the client may learn the names of the models.
    """
    fine = [_fine(model) for model in models]
    status = "healthy" if all(fine) else "degraded" if any(fine) else "unavailable"
    if not opened:
        status = "starting"
    if not known:
        return {"status": status, "models": len(models), "up": sum(fine)}
    return {"status": status, "models": {model.name: _facts(model) for model in models}}


def insist(address: GatewayThread[_App], ask: Callable[[_App], _Answer]) -> _Answer:
    """Call a function in the address's loop, which may be busy for a minute; see `call`."""
    return address.call(ask, _BUSY_SECONDS)


class AttachedGateway:
    """A model's gateway at the common address, from its engines' start to their end."""

    def __init__(self, address: GatewayThread[Any], model: ServedModel, gateway: Gateway) -> None:
        self._address, self._model, self._gateway = address, model, gateway
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        """Pass requests for the model to its gateway from now on."""

        def begin(_: object) -> None:
            self._task = asyncio.ensure_future(self._gateway.startup())
            self._model.open(self._gateway)

        insist(self._address, begin)

    @property
    def url(self) -> str:
        return self._address.url

    def call(self, ask: Callable[[Gateway], _Answer]) -> _Answer:
        return self._address.call(lambda _: ask(self._gateway))

    @property
    def cut(self) -> int:
        """The number of requests, of all models, that the address's end has cut off."""
        return self._address.cut

    def cut_off(self) -> None:
        self._address.cut_off()

    def stop(self, *, drain: bool = True) -> None:
        """Send the model no more requests and close it; ``drain`` waits for running requests."""

        def detach(_: object) -> None:
            if self._model.gateway is self._gateway:
                self._model.detach(self._gateway)
                self._task = asyncio.ensure_future(self._close())

        with suppress(LaunchError):  # the address is closed, and its gateways too
            insist(self._address, detach)
            deadline = time.monotonic() + (self._gateway.config.drain_seconds if drain else 0)
            while self._model.in_flight and time.monotonic() < deadline:
                time.sleep(_LOOK)

    async def _close(self) -> None:
        """Close the gateway after its requests, which end when its engines end."""
        deadline = time.monotonic() + self._gateway.config.drain_seconds + _BROKEN_OFF
        while self._model.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        await self._gateway.shutdown()
