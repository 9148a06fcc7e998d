"""``python -m turbofit.serving.fallback_server`` serves one model with Transformers until stopped.

The server is an engine like LMDeploy's server, behind a gateway that holds requests to the plan.
The gateway's code checks API keys and bodies here. Only the public interface of Transformers is
called. A device map names the device of each part of the model. One thread generates answers, one
request at a time. Only this child process imports torch and Transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import io
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, Final

import msgspec

from turbofit.core.errors import LaunchError, PackageError, TurbofitError
from turbofit.core.installation import install_command
from turbofit.core.process.network import DEFAULT_PORT
from turbofit.core.struct import Document, JsonObject
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.asgi_app import AsgiApp, while_connected
from turbofit.gateway.http.prepare import decode
from turbofit.gateway.http.refusals import Refusal, refusal_event
from turbofit.gateway.http.request_context import Receive, RequestContext, Send, answer
from turbofit.gateway.http.routes import Kind, Route, hold_name
from turbofit.gateway.limits.ranges import ANSWER_LENGTHS, hold_parameters
from turbofit.gateway.limits.request_body import read_body
from turbofit.gateway.limits.rules import Scope, refused
from turbofit.gateway.media.pictures import from_url
from turbofit.gateway.server import run_gateway
from turbofit.model.loading import load_model, load_processor
from turbofit.planning.commands import read_map

#: Fields of a body that have the same name and meaning in Transformers' GenerationConfig.
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
#: Seconds without a token after which the engine counts as stuck; the slowest prefill reads most of
#: the model from disk.
_STALLED: Final = 900.0
_RETRY_SECONDS: Final = 5
_SHOWN: Final = 300
_LARGEST: Final = 256 << 20
#: The types of documents, by route and by whether the document is an event of a stream.
_OBJECTS: Final = {
    ("chat", False): "chat.completion", ("chat", True): "chat.completion.chunk",
    ("completions", False): "text_completion", ("completions", True): "text_completion",
}  # fmt: skip
_OPTIONS: Final[Mapping[str, JsonObject]] = {
    "--model": {"required": True, "help": "a checkpoint's folder, or a hub id"},
    "--served-name": {"help": "the model's name for clients; default: --model"},
    "--device-map": {"required": True, "help": "JSON"},
    "--offload-folder": {"help": "folder of weights that the map puts on disk"},
    "--dtype": {"default": "bfloat16", "choices": ("float16", "bfloat16", "float32")},
    "--session-len": {"type": int, "required": True, "help": "most tokens of a request"},
    "--host": {"default": "127.0.0.1"},
    "--port": {"type": int, "default": DEFAULT_PORT},
    "--api-keys": {"nargs": "+", "action": "extend", "default": [], "help": "the keys of clients"},
}


class ServedModel:
    """Transformers' model and processor, which one thread uses for one request at a time.

    ``session_len``: the most tokens of prompt and answer. ``fatal`` is the reason to end the
    process, empty if there is no reason.
    """

    def __init__(self, model: Any, processor: Any, session_len: int) -> None:
        self._model, self._processor, self.session_len = model, processor, session_len
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.fatal = ""
        #: The time of the present request's last token; None between requests.
        self.moved: float | None = None
        #: Whether any request has been answered.
        self._answered = False

    def generate(
        self, kind: Kind, body: JsonObject, streamer: Any, left: threading.Event
    ) -> tuple[str, JsonObject]:
        """Answer a request; return the finish reason and the usage. ``streamer`` gets the text.

        If ``left`` is set, the answer ends with the next token.

        Raises:
            Refusal: the request cannot be read, is too long, or failed. The refusal has no
                exception context, since a context keeps tensors alive.
        """
        torch = import_module("torch")
        self.moved = time.monotonic()
        try:
            done = self._generate(kind, body, streamer, left)
            self._answered = True
            return done
        except Refusal:
            raise
        except torch.OutOfMemoryError as exc:
            # A process that has never answered would fail at each request. So it ends with torch's
            # message, and the supervisor makes another plan.
            self.fatal = "" if self._answered else f"torch.OutOfMemoryError: {_one_line(exc)}"
            failure = Refusal("out_of_memory", said=_one_line(exc), retry_after=_RETRY_SECONDS)
        except Exception as exc:  # noqa: BLE001 - the code of a model raises anything
            traceback.print_exception(exc)
            if "CUDA error" in str(exc):  # CUDA's context is lost, and every later call fails
                self.fatal = f"{type(exc).__name__}: {_one_line(exc)}"
            failure = Refusal("engine_failed", said=_one_line(exc))
        finally:
            self.moved = None
            streamer.end()
        if failure.reason == "out_of_memory":
            torch.cuda.empty_cache()
        raise failure

    def _generate(
        self, kind: Kind, body: JsonObject, streamer: Any, left: threading.Event
    ) -> tuple[str, JsonObject]:
        """Generate an answer; return the finish reason and the usage."""
        torch, transformers = import_module("torch"), import_module("transformers")
        inputs = self._inputs(kind, body).to(self._model.device)
        prompt = inputs["input_ids"].shape[-1]
        room = self.session_len - prompt
        if room <= 0:
            raise Refusal("bad_request:prompt", tokens=prompt, most=self.session_len)
        config = copy.deepcopy(self._model.generation_config)
        # As in LMDeploy, the first of these fields that a body has limits the answer.
        lengths = [body[name] for name in ANSWER_LENGTHS[kind] if name in body]
        biases, temperature = body.get("logit_bias", {}).items(), body.get("temperature")
        config.update(
            **{name: body[name] for name in _SAMPLING if body.get(name)},
            do_sample=config.do_sample if temperature is None else temperature > 0,
            max_new_tokens=min([*lengths[:1], room]),
            stop_strings=body.get("stop"),
            sequence_bias={(int(token),): float(bias) for token, bias in biases} or None,
        )
        if "seed" in body:
            torch.manual_seed(body["seed"])

        def ends(ids: Any, _scores: Any, **_: Any) -> Any:
            """Tell Transformers after each token whether to end, and record the token's time."""
            self.moved = time.monotonic()
            return torch.full((ids.shape[0],), left.is_set(), device=ids.device)

        rows = self._model.generate(
            **inputs,
            generation_config=config,
            stopping_criteria=transformers.StoppingCriteriaList([ends]),
            streamer=streamer,
            tokenizer=self.tokenizer,
        )
        count = rows.shape[-1] - prompt
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "total_tokens": prompt + count,
        }
        return "length" if count >= config.max_new_tokens else "stop", usage

    def _inputs(self, kind: Kind, body: JsonObject) -> Any:
        """Return the tokens and pictures of a prompt in the model's form.

        Raises:
            Refusal: the tokenizer, the processor or the chat template refuses the request.
        """
        try:
            if kind == "completions":
                return self.tokenizer(body["prompt"], return_tensors="pt")
            return self._processor.apply_chat_template(
                [{**message, "content": self._content(message)} for message in body["messages"]],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **body.get("chat_template_kwargs", {}),
            )
        except (RuntimeError, MemoryError, ImportError):  # the request is not the cause
            raise
        except Exception as exc:  # noqa: BLE001 - templates and processors raise anything
            raise Refusal("bad_request:unread", said=_one_line(exc)) from None

    def _content(self, message: JsonObject) -> Any:
        """Return a message's parts with opened images; a single text for a model without images."""
        from PIL import Image

        parts = message.get("content") or []
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        if not hasattr(self._processor, "image_processor"):
            return " ".join(part["text"] for part in parts)
        for part in parts:
            if part["type"] == "image":
                data = io.BytesIO(base64.b64decode(part["image"]))
                part["image"] = Image.open(data).convert("RGB")
        return parts


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:_SHOWN] or type(exc).__name__


def load(
    checkpoint: str, device_map: Mapping[str, int | str], dtype: str, session_len: int, offload: str
) -> ServedModel:
    """Load a checkpoint with its processor, on the devices of the device map.

    ``offload`` is a folder for weights that the map puts on disk, if no safetensors file has them.

    Raises:
        PackageError: torch, Transformers or Accelerate is missing.
        LaunchError: the model cannot be loaded. Torch's own memory error passes unchanged.
    """
    try:
        torch, *_ = map(import_module, ("torch", "transformers", "accelerate"))
    except ImportError as exc:
        raise PackageError(
            f"the fallback engine cannot start: {exc}", hint=install_command("fallback")
        ) from None
    _say("loading weights")
    began = time.monotonic()
    try:
        processor = load_processor(checkpoint)
        model = load_model(
            checkpoint,
            device_map=dict(device_map),
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            offload_folder=offload,
        )
    except (OSError, ValueError) as exc:
        raise LaunchError(
            f"Transformers cannot load {checkpoint}: {exc}",
            hint="see turbofit plan --engine transformers",
        ) from None
    if not getattr(processor, "chat_template", None) and hasattr(processor, "tokenizer"):
        # Older checkpoints have the template in the tokenizer.
        processor.chat_template = processor.tokenizer.chat_template
    _say(f"weights loaded in {time.monotonic() - began:.1f} s")
    return ServedModel(model, processor, session_len)


class FallbackApp(AsgiApp):
    """Serves one model over HTTP by the gateway's rules; ``name`` is the model's name for clients.

    When the process must end, ``on_fatal`` is called with the reason, after the answer is sent.
    """

    def __init__(
        self,
        model: ServedModel,
        name: str,
        config: GatewayConfig,
        on_fatal: Callable[[str], None],
    ) -> None:
        super().__init__(config.changed(names={name: name}), _LARGEST)
        self._model, self._name, self._on_fatal = model, name, on_fatal
        self._one_at_a_time = ThreadPoolExecutor(1, "generate")

    def _health(self, _: RequestContext, /) -> tuple[Document, int | None]:
        """Return the health page: stalled if a request gets no token for `_STALLED` seconds."""
        moved = self._model.moved
        stalled = moved is not None and time.monotonic() - moved > _STALLED
        return ({"status": "stalled"}, _RETRY_SECONDS) if stalled else ({"status": "ok"}, None)

    async def metrics_text(self) -> str:
        """Refuse a request for metrics.

        Raises:
            Refusal: Transformers has no metrics.
        """
        raise Refusal("not_found:transformers", path="/metrics")

    def _record(self, request: RequestContext) -> None:  # noqa: ARG002 - see `AsgiApp`
        if self._model.fatal:
            self._on_fatal(self._model.fatal)

    async def _serve(
        self, request: RequestContext, route: Route, /, receive: Receive, send: Send
    ) -> None:
        """Answer a chat or a completion; stop the generation when the client leaves."""
        if route.kind not in ("chat", "completions"):
            raise Refusal("not_found:transformers", path=route.path)
        body = self._checked_body(route.kind, await self._bodies.read(request.headers, receive))
        left, loop = threading.Event(), asyncio.get_running_loop()
        streamer = import_module("transformers").AsyncTextIteratorStreamer(
            self._model.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        generated = loop.run_in_executor(
            self._one_at_a_time, self._model.generate, route.kind, body, streamer, left
        )
        with while_connected(receive, request):
            try:
                await self._answer(request, route.kind, body, streamer, generated, send)
            finally:
                left.set()
                generated.cancel()

    def _checked_body(self, kind: Kind, raw: bytes) -> JsonObject:
        """Return a body with its images inline; raise a `Refusal` for a body that breaks a rule."""
        parsed = read_body(kind, decode(raw))
        hold_name(self.config.names, parsed.body)
        scope = Scope(engine="transformers", context=self._model.session_len)
        hold_parameters(kind, parsed.body, scope)
        if parsed.copies > 1:
            raise refused("n", f"is {parsed.copies}: this engine answers one request at a time")
        for slot in parsed.slots:
            picture = from_url(slot.source, _LARGEST)
            slot.place[slot.index] = {"type": "image", "image": picture.base64}
        return parsed.body

    async def _answer(
        self,
        request: RequestContext,
        kind: Kind,
        body: JsonObject,
        texts: AsyncIterator[str],
        generated: asyncio.Future[tuple[str, JsonObject]],
        send: Send,
    ) -> None:
        """Send the answer as a whole, or as a stream, which begins with the first text."""
        stream, whole, begun = bool(body.get("stream")), "", False

        def document(text: str, reason: str | None = None, **more: Any) -> bytes:
            """Return an event of a stream, or the whole answer, as OpenAI's JSON."""
            content: JsonObject = {"text": text}
            if kind == "chat":
                message = {"role": "assistant", "content": text}
                content = {"delta" if stream else "message": message}
            return msgspec.json.encode({
                "id": request.id, "object": _OBJECTS[kind, stream], "created": int(time.time()),
                "model": self._name, "choices": [{"index": 0, **content, "finish_reason": reason}],
                **more,
            })  # fmt: skip

        async def put(data: bytes, *, more: bool = True) -> None:
            """Send a part of a stream, after the stream's head."""
            nonlocal begun
            if not begun:
                begun = True
                headers = [(b"content-type", b"text/event-stream"), *request.answer_headers]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async for text in texts:
            whole += text
            if stream and text:
                await put(b"data: %b\n\n" % document(text))
        try:
            reason, usage = await generated
        except Refusal as refusal:
            if not begun:
                raise
            await put(refusal_event("openai", refusal), more=False)
            return
        if stream:
            last = document("", reason, usage=usage)
            await put(b"data: %b\n\ndata: [DONE]\n\n" % last, more=False)
        else:
            data = document(whole, reason, usage=usage)
            await answer(request, send, 200, data, "application/json")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; return the exit code."""
    what = "Serve one model through Transformers, with one device map, on one port, until stopped."
    parser = argparse.ArgumentParser("turbofit-fallback", description=what)
    for name, more in _OPTIONS.items():
        parser.add_argument(name, **more)
    given = parser.parse_args(argv)
    config = GatewayConfig(host=given.host, port=given.port, api_key=tuple(given.api_keys))
    try:
        with tempfile.TemporaryDirectory(prefix="turbofit-offload-") as scratch:
            placed, offload = read_map(given.device_map), given.offload_folder or scratch
            model = load(given.model, placed, given.dtype, given.session_len, offload)
            app = FallbackApp(model, given.served_name or given.model, config, _end)
            run_gateway(app, on_ready=lambda url: _say(f"Uvicorn running on {url}"))
    except TurbofitError as exc:
        print(f"turbofit-fallback: {exc.message}\nhint: {exc.hint}", file=sys.stderr)  # noqa: T201
        return exc.exit_code
    return 0


def _end(reason: str) -> None:
    """End the process immediately; nothing repairs its memory or its CUDA context."""
    print(reason, file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _say(text: str) -> None:
    """Print progress for the supervisor, whose reader is ``logs.log_reader``."""
    print(f"turbofit-fallback: {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
