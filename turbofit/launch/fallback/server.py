"""``python -m turbofit.launch.fallback.server``: one model, one map, one port, until it is stopped.

An engine as LMDeploy's server is one: the gateway stands before it, and holds requests to the plan.
What a request meets on its way is the gateway's here, too; Transformers' handlers answer, one
request at a time. Torch and Transformers are imported in here only: the supervisor runs it as a
child.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.core.units import format_bytes
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.asgi_app import AsgiApp, while_connected
from turbofit.gateway.http.bodies import read_body
from turbofit.gateway.http.body import Bodies
from turbofit.gateway.http.connections import Connections, Networks
from turbofit.gateway.http.guard import Keys, Origins
from turbofit.gateway.http.metrics import Metrics
from turbofit.gateway.http.model_names import hold_name
from turbofit.gateway.http.pages import names_page
from turbofit.gateway.http.prepare import decode
from turbofit.gateway.http.refusals import Refusal, refusal_event
from turbofit.gateway.http.routes import find_route, is_health
from turbofit.gateway.limits.ranges import hold_parameters
from turbofit.gateway.limits.rules import Scope, refused
from turbofit.gateway.media.pictures import from_url
from turbofit.gateway.routing.request_context import RequestContext, answer
from turbofit.gateway.server import run_gateway
from turbofit.launch.fallback.generating import (
    GenerationOptions,
    ServedModel,
    find_inside,
    load,
    make_handlers,
    one_line,
)
from turbofit.planning.fallback_command import read_map

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.json_types import JsonObject
    from turbofit.gateway.http.asgi import Message, Receive, Send
    from turbofit.gateway.http.routes import Kind

__all__ = ["FallbackApp", "main"]

#: What the supervisor reads: see ``observe.log_reader``.
_SAYS: Final = "turbofit-fallback:"
_LARGEST: Final = 256 << 20
_PAUSE: Final = 0.02
#: How Transformers ends a stream that failed.
_FAILED: Final = 'data: {"error": "'
#: Failures before anything was generated that are the client's: by then only its messages, its
#: images and its options were read.
_OF_CLIENT: Final = (
    ValueError, OSError, LookupError, TypeError, AttributeError, OverflowError, SyntaxError,
)  # fmt: skip


class FallbackApp(AsgiApp):
    """Transformers' handlers behind the gateway's own rules, and a gate of one.

    Args:
        handlers: by the kinds of their routes.
        model: what generates.
        options: what is served.
        config: keys, and how long bodies may take.
        on_fatal: called with the reason when the process must end, after the answer was sent.
    """

    def __init__(
        self,
        handlers: Mapping[Kind, Any],
        model: ServedModel,
        options: GenerationOptions,
        config: GatewayConfig,
        on_fatal: Callable[[str], None],
    ) -> None:
        super().__init__(Metrics(), Origins(config.allow_origins))
        self.config, self._handlers, self._model = config, handlers, model
        self._options, self._on_fatal = options, on_fatal
        self.connections = Connections(config.connection, Networks(()), self.metrics.count)
        self._keys, self._bodies = Keys(config.api_keys), Bodies(_LARGEST, config)
        self._gate = asyncio.Lock()

    async def startup(self) -> None:
        """See `AsgiApp`."""

    async def shutdown(self) -> None:
        """See `AsgiApp`."""

    def _record(self, request: RequestContext) -> None:  # noqa: ARG002 - see `AsgiApp`
        if self._model.fatal:
            self._on_fatal(self._model.fatal)

    async def _serve(
        self, request: RequestContext, path: bytes, _scope: Message, receive: Receive, send: Send
    ) -> None:
        if is_health(path):
            health = self._model.health
            page, status = msgspec.json.encode({"status": health}), 200 if health == "ok" else 503
            await answer(request, send, status, page, "application/json")
            return
        self._keys.check(request.headers)
        route = find_route(request.method, path)
        if route.kind == "models":
            await names_page(request, send, {self._options.name: self._options.name})
            return
        if route.kind not in self._handlers:
            raise Refusal("not_found:transformers", path=route.path)
        body = self._held(route.kind, await self._bodies.read(request.headers, receive))
        with while_connected(receive, request):
            async with self._gate:
                self._model.take()
                try:
                    await self._answer(request, route.kind, body, send)
                finally:
                    self._model.cancelled.set()  # nobody waits for more, and it may go on
                    while not self._model.idle.is_set():
                        await asyncio.sleep(_PAUSE)

    def _held(self, kind: Kind, raw: bytes) -> JsonObject:
        """A body as the gateway would hold it, with its images inline.

        Raises:
            Refusal: it is no request of this API, or for another model.
        """
        parsed = read_body(kind, decode(raw))
        hold_name({self._options.name: self._options.name}, parsed.body)
        scope = Scope(engines=("transformers",), vocabulary=0, session=self._options.session_len)
        hold_parameters(kind, parsed.body, scope)
        asked = "messages" if kind == "chat" else "prompt"
        if not parsed.body.get(asked):
            raise refused(asked, "is missing or empty")
        if parsed.copies > 1:
            raise refused("n", f"is {parsed.copies}: this engine answers one request at a time")
        count, most = len(parsed.slots), self._options.max_images
        if count > most:
            raise Refusal("too_many_images", count=count, images="images", most=most)
        for slot in parsed.slots:
            slot.fill(from_url(slot.source, _LARGEST), {})
        if isinstance(parsed.body[asked], list) and kind == "completions":
            parsed.body[asked] = parsed.body[asked][0]
        return parsed.body

    async def _answer(
        self, request: RequestContext, kind: Kind, body: JsonObject, send: Send
    ) -> None:
        """Pass the answer on; the head of a stream once something of it was generated.

        Raises:
            Refusal: nothing was, and why.
        """
        try:
            response = await self._handlers[kind].handle_request(body, request.id)
        except Exception as exc:
            self._model.idle.set()  # it has ended, or was never begun
            raise self._refusal(exc) from exc
        if not body.get("stream"):
            await answer(request, send, 200, response.body, "application/json")
            return
        # The first event of a chat comes before anything is generated.
        waits, begun, held, end = kind == "chat", False, "", b"data: [DONE]\n\n"
        headers = [(b"content-type", b"text/event-stream"), *request.out]
        try:
            async for events in response.body_iterator:
                text, failed, said = events.partition(_FAILED)
                if failed:
                    raise self._model.failure or RuntimeError(said)
                held += text
                if waits:
                    waits = False
                    continue
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": held.encode(), "more_body": True})
                held = ""
        except Exception as exc:
            refusal = self._refusal(exc)
            if not begun:
                raise refusal from exc
            end = refusal_event("openai", refusal)
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _refusal(self, exc: Exception) -> Refusal:
        """What a client is told of a failure."""
        if isinstance(exc, Refusal):
            return exc
        if type(exc).__name__ == "OutOfMemoryError":
            return self._model.ran_short(exc)
        of_template = type(exc).__module__.startswith("jinja2")
        if not self._model.begun and (of_template or isinstance(exc, _OF_CLIENT)):
            return Refusal("bad_request:unread", said=one_line(exc))
        traceback.print_exception(exc)
        return Refusal("engine_failed", said=one_line(exc))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one model through Transformers until stopped; returns the exit code."""
    parser = argparse.ArgumentParser("turbofit-fallback", description=main.__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint's folder, or a hub id")
    add("--served-name", dest="name", help="what clients call it; default: --model")
    add("--device-map", required=True, help="JSON, or a file that holds it")
    add("--offload-folder", dest="offload", help="for what the map sends to disk")
    add("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"))
    add("--session-len", type=int, required=True, help="tokens of a request")
    add("--max-images", type=int, default=1, help="of a request")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=DEFAULT_PORT)
    add("--api-keys", nargs="+", action="extend", default=[], help="who may ask; default: anybody")
    given = vars(parser.parse_args(argv))
    config = GatewayConfig(
        host=given.pop("host"), port=given.pop("port"), api_keys=tuple(given.pop("api_keys"))
    )
    try:
        with tempfile.TemporaryDirectory(prefix="turbofit-offload-") as scratch:
            given["device_map"] = read_map(given["device_map"])
            given["name"], given["offload"] = (
                given["name"] or given["model"],
                given["offload"] or scratch,
            )
            _serve(GenerationOptions(**given), config)
    except TurbofitError as exc:
        print(f"turbofit-fallback: {exc.message}\nhint: {exc.hint}", file=sys.stderr)  # noqa: T201
        return exc.exit_code
    return 0


def _serve(options: GenerationOptions, config: GatewayConfig) -> None:
    """Load the model, and serve it.

    Raises:
        PackageError: Transformers is missing, or another inside.
        LaunchError: the model cannot be loaded; torch's own lack of memory is left as it is.
    """
    began = time.monotonic()
    inside = find_inside()
    _say(f"transformers {inside['version']} is there after {time.monotonic() - began:.1f} s")
    _say("loading weights")
    began = time.monotonic()
    try:
        model, processor = load(options)
    except (OSError, ValueError) as exc:
        raise LaunchError(
            f"Transformers cannot load {options.model}: {exc}",
            hint="see turbofit plan --engine transformers",
        ) from None
    cuda: Any = import_module("torch").cuda
    held = [
        f"device {number}: {format_bytes(cuda.memory_reserved(number))}"
        for number in range(cuda.device_count())
    ]
    _say(f"weights loaded in {time.monotonic() - began:.1f} s {'; '.join(held)}")
    app = FallbackApp(
        make_handlers(inside, options, model, processor), model, options, config, _end
    )
    run_gateway(app, on_ready=lambda url: _say(f"Uvicorn running on {url}"))


def _end(reason: str) -> None:
    """End the process at once: its memory, or its CUDA context, cannot be repaired."""
    print(reason, file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _say(text: str) -> None:
    print(f"{_SAYS} {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
