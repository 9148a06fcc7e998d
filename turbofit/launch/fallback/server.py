"""``python -m turbofit.launch.fallback.server``: one model, one map, one port, until stopped.

It is an engine like LMDeploy's server, behind a gateway that holds requests to the plan. It takes
keys, bodies and refusals from the gateway's code; the handlers of ``transformers serve`` answer,
one request at a time. Only this child process imports torch and Transformers.

Transformers guarantees none of these classes. All that are used are checked first, so that a
release that moved one fails immediately and with one line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import inspect
import io
import os
import sys
import tempfile
import threading
import time
import traceback
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from turbofit.core.errors import LaunchError, PackageError, TurbofitError
from turbofit.core.installation import install_command
from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.asgi_app import AsgiApp, while_connected
from turbofit.gateway.http.prepare import decode
from turbofit.gateway.http.refusals import Refusal, refusal_event
from turbofit.gateway.http.request_context import RequestContext, answer
from turbofit.gateway.http.routes import ModelCard, hold_name
from turbofit.gateway.limits.parameters import ANSWER_LENGTHS
from turbofit.gateway.limits.ranges import hold_parameters
from turbofit.gateway.limits.request_body import read_body
from turbofit.gateway.limits.rules import Scope, refused
from turbofit.gateway.media.pictures import from_url
from turbofit.gateway.server import run_gateway
from turbofit.model.loading import load_model, load_processor
from turbofit.planning.commands import read_map

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.json_types import Document, JsonObject
    from turbofit.gateway.http.request_context import Receive, Send
    from turbofit.gateway.http.routes import Kind, Route

#: Releases that were tried.
_TRIED: Final = "5.17 and 5.24"
#: Module of ``transformers.cli.serving``, class, method, and parameters that this server passes.
_USED: Final = (
    ("model_manager", "ModelManager", "get_model_modality", "model processor"),
    ("utils", "GenerationState", "get_manager", "model_id use_cb"),
    ("chat_completion", "ChatCompletionHandler", "__init__", "model_manager generation_state"),
    ("chat_completion", "ChatCompletionHandler", "_validate_request", "body"),
    ("chat_completion", "ChatCompletionHandler", "_resolve_model", "body"),
    ("chat_completion", "ChatCompletionHandler", "_build_generation_config", "body use_cb"),
    ("chat_completion", "ChatCompletionHandler", "get_processor_inputs_from_messages",
     "messages modality"),
    ("chat_completion", "ChatCompletionHandler", "handle_request", "body request_id"),
    ("completion", "CompletionHandler", "handle_request", "body request_id"),
)  # fmt: skip

#: Fields of a body that the handlers get: Transformers reads them, and the gateway holds them.
_COMMON: Final = frozenset({"stream", "temperature", "top_p", "seed", "frequency_penalty", "stop"})
_READ: Final[Mapping[Kind, frozenset[str]]] = {
    "chat": _COMMON | {"messages", "tools", "logit_bias", "chat_template_kwargs"},
    "completions": _COMMON | {"prompt"},
}
#: Seconds without a token after which the engine counts as stuck. The slowest prefill reads most of
#: the model from disk once.
_STALLED: Final = 900.0
#: Requests in a row that ran out of memory after which the engine starts again.
_MOST_SHORT: Final = 3
_RETRY_SECONDS: Final = 5
_SHOWN: Final = 300
_LARGEST: Final = 256 << 20
_PAUSE: Final = 0.02
#: How Transformers ends a stream that failed.
_FAILED: Final = 'data: {"error": "'
#: Errors before anything was generated that the client's request does not cause.
_OURS: Final = (RuntimeError, MemoryError, ImportError)


class GenerationOptions(NamedTuple):
    """The model that is served, and its options.

    ``session_len``: tokens of prompt and answer; ``max_images``: images of a request; ``offload``:
    a folder for weights that the map sends to the disk and that no safetensors file contains.
    """

    model: str
    name: str
    device_map: Mapping[str, int | str]
    dtype: str
    session_len: int
    max_images: int = 1
    offload: str | None = None


class ServedModel:
    """Transformers' model for one request at a time; it can be stopped, and reports failures.

    The event loop, which takes requests, shares it with the thread that generates. ``cancelled``:
    no client waits for the answer. ``idle``: nothing is generated. ``begun``: the request has
    reached generation. ``failure`` is the error for its client. ``fatal`` says why the process must
    end.
    """

    def __init__(self, model: Any, session_len: int) -> None:
        self._model, self._session_len = model, session_len
        self.cancelled, self.idle = threading.Event(), threading.Event()
        self.idle.set()
        self.begun = False
        self.failure: Refusal | None = None
        self.fatal = ""
        self._moved = time.monotonic()
        #: Requests in a row that ran out of memory; before the first answer one is enough to end.
        self._shortages = _MOST_SHORT - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def take(self) -> None:
        self.cancelled.clear()
        self.begun, self.failure = False, None
        self._moved = time.monotonic()

    def start(self) -> None:
        """Note that the thread generates, or will generate soon."""
        self.begun = True
        self.idle.clear()

    @property
    def health(self) -> Literal["ok", "stalled"]:
        """Whether tokens come while something is generated."""
        if self.idle.is_set() or time.monotonic() - self._moved < _STALLED:
            return "ok"
        return "stalled"

    def generate(self, **keywords: Any) -> Any:
        """Generate within the context; a `Refusal` has no ``__cause__``: it would keep tensors."""
        torch, tokens = import_module("torch"), keywords["input_ids"].shape[-1]
        config, left = keywords["generation_config"], self._session_len - tokens
        config.max_new_tokens = min(config.max_new_tokens, left)
        ends = import_module("transformers").StoppingCriteriaList([self._ends])
        try:
            if left > 0:
                answer = self._model.generate(**keywords, stopping_criteria=ends)
                self._shortages = 0
                return answer
            failure = Refusal("bad_request:prompt", tokens=tokens, most=self._session_len)
        except torch.OutOfMemoryError as exc:
            failure = self.ran_short(exc)
        except RuntimeError as exc:
            traceback.print_exception(exc)
            if "CUDA error" in str(exc):  # the context is lost, so that every later call fails
                self.fatal = f"RuntimeError: {_one_line(exc)}"
            failure = Refusal("engine_failed", said=_one_line(exc))
        finally:
            self.idle.set()
        if failure.reason == "out_of_memory":
            torch.cuda.empty_cache()
        self.failure = failure
        raise failure

    def _ends(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
        """Whether each row ends; Transformers calls it after each token."""
        self._moved = time.monotonic()
        shape, ends = (input_ids.shape[0],), self.cancelled.is_set()
        torch = import_module("torch")
        return torch.full(shape, ends, dtype=torch.bool, device=input_ids.device)

    def ran_short(self, exc: BaseException) -> Refusal:
        """The refusal for a client whose request ran out of GPU memory.

        The engine can go on, but one that has never answered, or runs out again and again, would
        fail for ever: it ends with torch's message, from which the supervisor makes another plan.
        """
        self._shortages += 1
        if self._shortages >= _MOST_SHORT:
            self.fatal = f"torch.OutOfMemoryError: {_one_line(exc)}"
        return Refusal("out_of_memory", said=_one_line(exc), retry_after=_RETRY_SECONDS)


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:_SHOWN] or type(exc).__name__


def _find_inside() -> dict[str, Any]:
    """Transformers' own classes by name, checked in seconds; a `PackageError` if one differs."""
    classes: dict[str, Any] = {}
    what = ""
    try:
        for what in ("torch", "transformers", "accelerate", "fastapi", "openai"):
            import_module(what)
        for part, what, method, given in _USED:
            classes[what] = getattr(import_module(f"transformers.cli.serving.{part}"), what)
            taken = inspect.signature(getattr(classes[what], method)).parameters
            if missing := set(given.split()) - set(taken):
                raise AttributeError(f"{method} takes no {', '.join(sorted(missing))}")
    except (ImportError, AttributeError) as exc:
        raise PackageError(
            f"the fallback engine needs {what} as transformers {_TRIED} have it: {exc}",
            hint=install_command("fallback"),
        ) from None
    return classes


def make_handlers(options: GenerationOptions) -> tuple[ServedModel, dict[Kind, Any]]:
    """Load the model, and make Transformers' handlers around it, by the kinds of their routes.

    Raises:
        PackageError: Transformers is missing, or its classes differ.
        LaunchError: the model cannot be loaded; torch's own memory error is raised as it is.
    """
    inside = _find_inside()
    _say("loading weights")
    began, torch = time.monotonic(), import_module("torch")
    try:
        processor = load_processor(options.model)
        whole = load_model(
            options.model,
            device_map=dict(options.device_map),
            dtype=getattr(torch, options.dtype),
            attn_implementation="sdpa",
            offload_folder=options.offload,
        )
    except (OSError, ValueError) as exc:
        raise LaunchError(
            f"Transformers cannot load {options.model}: {exc}",
            hint="see turbofit plan --engine transformers",
        ) from None
    tokenizer = getattr(processor, "tokenizer", None)
    if not getattr(processor, "chat_template", None) and tokenizer is not None:
        processor.chat_template = tokenizer.chat_template  # older checkpoints keep it there
    _say(f"weights loaded in {time.monotonic() - began:.1f} s")
    modality = inside["ModelManager"].get_model_modality(whole, processor=processor)
    manager = SimpleNamespace(get_model_modality=lambda *_, **__: modality)
    model, state = ServedModel(whole, options.session_len), inside["GenerationState"]()
    kinds: dict[Kind, str] = {"chat": "ChatCompletionHandler", "completions": "CompletionHandler"}
    return model, {
        kind: _handler_class(kind, inside[name], options, model, processor)(manager, state)
        for kind, name in kinds.items()
    }


def _handler_class(
    kind: Kind, base: Any, options: GenerationOptions, model: ServedModel, processor: Any
) -> Any:
    """A handler that reads only the fields that are held, and decodes images itself.

    Transformers' own loader of images takes any address or file. Its sampling follows the model's
    default, whatever temperature is asked for.
    """
    from PIL import Image

    class Handler(base):  # type: ignore[misc]
        def _validate_request(self, body: Any) -> None:
            lengths = [body[name] for name in ANSWER_LENGTHS[kind] if name in body]
            for name in set(body) - _READ[kind]:
                del body[name]
            if biases := body.pop("logit_bias", None):  # Transformers takes no empty or whole ones
                body["logit_bias"] = {token: float(bias) for token, bias in biases.items()}
            body["max_tokens"] = min([*lengths[:1], options.session_len])

        def _resolve_model(self, _body: Any) -> Any:
            return options.name, model, processor

        @staticmethod
        def get_processor_inputs_from_messages(messages: Any, modality: Any) -> Any:
            inputs = base.get_processor_inputs_from_messages(messages, modality)
            for message in inputs:
                parts = message["content"] if isinstance(message["content"], list) else []
                for part in parts:
                    if part["type"] == "image":
                        data = base64.b64decode(part.pop("url").partition(",")[2])
                        part["image"] = Image.open(io.BytesIO(data)).convert("RGB")
            return inputs

        def _build_generation_config(self, body: Any, *args: Any, **kwargs: Any) -> Any:
            config = super()._build_generation_config(body, *args, **kwargs)
            if body.get("temperature") is not None:
                config.do_sample = body["temperature"] > 0
            model.start()  # before the thread is told: a wait for its end must not begin earlier
            return config

    return Handler


class FallbackApp(AsgiApp):
    """Transformers' handlers behind the gateway's own rules, which runs one request at a time.

    ``on_fatal`` is called with the reason when the process must end, after the answer was sent.
    """

    def __init__(
        self,
        handlers: Mapping[Kind, Any],
        model: ServedModel,
        options: GenerationOptions,
        config: GatewayConfig,
        on_fatal: Callable[[str], None],
    ) -> None:
        super().__init__(config, _LARGEST)
        self._handlers, self._model = handlers, model
        self._options, self._on_fatal = options, on_fatal
        self._gate = asyncio.Lock()

    def _health(self, _: RequestContext, /) -> tuple[Document, int | None]:
        health = self._model.health
        return {"status": health}, None if health == "ok" else _RETRY_SECONDS

    async def metrics_text(self) -> str:
        """Refuse to give metrics: this engine has none.

        Raises:
            Refusal: Transformers has no metrics.
        """
        raise Refusal("not_found:transformers", path="/metrics")

    def _cards(self) -> list[ModelCard]:
        return [ModelCard(self._options.name, self._options.name)]

    def _record(self, request: RequestContext) -> None:  # noqa: ARG002 - see `AsgiApp`
        if self._model.fatal:
            self._on_fatal(self._model.fatal)

    async def _serve(
        self, request: RequestContext, route: Route, /, receive: Receive, send: Send
    ) -> None:
        if route.kind not in self._handlers:
            raise Refusal("not_found:transformers", path=route.path)
        body = self._held(route.kind, await self._bodies.read(request.headers, receive))
        with while_connected(receive, request):
            async with self._gate:
                self._model.take()
                try:
                    await self._answer(request, route.kind, body, send)
                finally:
                    self._model.cancelled.set()  # no client waits, and it may still generate
                    while not self._model.idle.is_set():
                        await asyncio.sleep(_PAUSE)

    def _held(self, kind: Kind, raw: bytes) -> JsonObject:
        """The body within the gateway's rules, with its images inline; a `Refusal` of any other."""
        parsed = read_body(kind, decode(raw))
        hold_name({self._options.name: self._options.name}, parsed.body)
        scope = Scope(engine="transformers", session=self._options.session_len)
        hold_parameters(kind, parsed.body, scope)
        field = "messages" if kind == "chat" else "prompt"
        if not parsed.body.get(field):
            raise refused(field, "is missing or empty")
        if parsed.copies > 1:
            raise refused("n", f"is {parsed.copies}: this engine answers one request at a time")
        count, most = len(parsed.slots), self._options.max_images
        if count > most:
            raise Refusal("too_many_images", count=count, images="images", most=most)
        for slot in parsed.slots:
            slot.fill(from_url(slot.source, _LARGEST), {})
        if isinstance(parsed.body[field], list) and kind == "completions":
            parsed.body[field] = parsed.body[field][0]
        return parsed.body

    async def _answer(
        self, request: RequestContext, kind: Kind, body: JsonObject, send: Send
    ) -> None:
        """Pass the answer on; a stream's head goes with its first output, a `Refusal` before it."""
        try:
            response = await self._handlers[kind].handle_request(body, request.id)
        except Exception as exc:
            self._model.idle.set()  # generating has ended, or never began
            raise self._refusal(exc) from exc
        if not body.get("stream"):
            await answer(request, send, 200, response.body, "application/json")
            return
        # A chat's first event comes before anything is generated.
        waits, begun, pending, end = kind == "chat", False, "", b"data: [DONE]\n\n"
        headers = [(b"content-type", b"text/event-stream"), *request.out]
        try:
            async for events in response.body_iterator:
                text, failed, cause = events.partition(_FAILED)
                if failed:
                    raise self._model.failure or RuntimeError(cause)
                pending += text
                if waits:
                    waits = False
                    continue
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send(
                    {"type": "http.response.body", "body": pending.encode(), "more_body": True}
                )
                pending = ""
        except Exception as exc:
            refusal = self._refusal(exc)
            if not begun:
                raise refusal from exc
            end = refusal_event("openai", refusal)
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _refusal(self, exc: Exception) -> Refusal:
        if isinstance(exc, Refusal):
            return exc
        if type(exc).__name__ == "OutOfMemoryError":
            return self._model.ran_short(exc)
        if not self._model.begun and not isinstance(exc, _OURS):
            return Refusal("bad_request:unread", said=_one_line(exc))
        traceback.print_exception(exc)
        return Refusal("engine_failed", said=_one_line(exc))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped; returns the exit code."""
    what = "Serve one model through Transformers, with one device map, on one port, until stopped."
    parser = argparse.ArgumentParser("turbofit-fallback", description=what)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint's folder, or a hub id")
    add("--served-name", dest="name", help="what clients call it; default: --model")
    add("--device-map", required=True, help="JSON")
    add("--offload-folder", dest="offload", help="for what the map sends to disk")
    add("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"))
    add("--session-len", type=int, required=True, help="tokens of a request")
    add("--max-images", type=int, default=1, help="of a request")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=DEFAULT_PORT)
    add("--api-keys", nargs="+", action="extend", default=[], help="who may ask; default: anybody")
    given = vars(parser.parse_args(argv))
    public = {name: given.pop(name) for name in ("host", "port", "api_keys")}
    try:
        with tempfile.TemporaryDirectory(prefix="turbofit-offload-") as scratch:
            given["name"] = given["name"] or given["model"]
            given["offload"] = given["offload"] or scratch
            options = GenerationOptions(**{**given, "device_map": read_map(given["device_map"])})
            model, handlers = make_handlers(options)
            app = FallbackApp(handlers, model, options, GatewayConfig(**public), _end)
            run_gateway(app, on_ready=lambda url: _say(f"Uvicorn running on {url}"))
    except TurbofitError as exc:
        print(f"turbofit-fallback: {exc.message}\nhint: {exc.hint}", file=sys.stderr)  # noqa: T201
        return exc.exit_code
    return 0


def _end(reason: str) -> None:
    """End the process immediately: its memory, or its CUDA context, cannot be repaired."""
    print(reason, file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _say(text: str) -> None:
    """Print progress, which the supervisor reads: see ``observe.log_reader``."""
    print(f"turbofit-fallback: {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
