"""``transformers serve``'s handlers around one model: an explicit map, a cap, an end on demand.

Transformers promises none of its classes there: each release may move them. All that is used is
checked before, so that another release fails at once and with one line.
"""

from __future__ import annotations

import base64
import inspect
import io
import threading
import time
import traceback
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from turbofit.core.errors import PackageError
from turbofit.core.installation import install_command
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.parameters import ANSWER_LENGTHS
from turbofit.memory.transformers.components import load_model, load_processor

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "STALLED", "GenerationOptions", "ServedModel", "find_inside", "load", "make_handlers",
    "one_line",
]  # fmt: skip

#: Releases that were tried.
_TRIED: Final = "5.17 and 5.24"
#: Module of ``transformers.cli.serving``, class, method, parameters that are given to it.
_USED: Final = (
    ("model_manager", "ModelManager", "get_model_modality", "model processor"),
    ("utils", "GenerateManager", "submit", "fn"),
    ("utils", "GenerateManager", "async_submit", "fn"),
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

#: What the handlers are given of a body: what Transformers reads, and the gateway holds.
_COMMON: Final = frozenset({"stream", "temperature", "top_p", "seed", "frequency_penalty", "stop"})
_READ: Final = {
    "chat": _COMMON | {"messages", "tools", "logit_bias", "chat_template_kwargs"},
    "completions": _COMMON | {"prompt"},
}
#: Seconds without a token after which the engine counts as stuck. Above any prefill: the slowest
#: reads most of the model from disk once.
STALLED: Final = 900.0
#: Requests in a row that ran out of memory after which starting again is better than going on.
_MOST_SHORT: Final = 3
_RETRY_SECONDS: Final = 5
_SHOWN: Final = 300


class GenerationOptions(NamedTuple):
    """What is served, and how.

    ``session_len``: tokens of prompt and answer; ``max_images`` a request; ``offload`` a folder for
    what the map sends to the disk and no safetensors file holds.
    """

    model: str
    name: str
    device_map: Mapping[str, int | str]
    dtype: str
    session_len: int
    max_images: int = 1
    offload: str | None = None


class ServedModel:
    """A model that generates for one request at a time, can be stopped, and says how it fares.

    The event loop, which takes requests, shares it with the thread that generates. What is not here
    is the model's own.

    Args:
        model: Transformers'.
        session_len: tokens of prompt and answer.

    Attributes:
        cancelled: set when nobody waits for the answer any more.
        idle: set while nothing is generated.
        begun: whether the current request came so far as to generate.
        failure: what its client is told where that failed.
        fatal: why the process must end, empty while it may live.
    """

    def __init__(self, model: Any, session_len: int) -> None:
        self._model, self._session_len = model, session_len
        self.cancelled, self.idle = threading.Event(), threading.Event()
        self.idle.set()
        self.begun = False
        self.failure: Refusal | None = None
        self.fatal = ""
        self._moved = time.monotonic()
        self._answered = self._shortages = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def take(self) -> None:
        """A new request is at work."""
        self.cancelled.clear()
        self.begun, self.failure = False, None
        self._moved = time.monotonic()

    def start(self) -> None:
        """The thread is told to generate."""
        self.begun = True
        self.idle.clear()

    @property
    def health(self) -> Literal["ok", "stalled"]:
        """Whether tokens come while something is generated."""
        if self.idle.is_set() or time.monotonic() - self._moved < STALLED:
            return "ok"
        return "stalled"

    def generate(self, **keywords: Any) -> Any:
        """As the model's own, as far as the context goes.

        Raises:
            Refusal: as `failure`; without the exception behind it, which holds tensors.
        """
        torch, tokens = import_module("torch"), keywords["input_ids"].shape[-1]
        config, left = keywords["generation_config"], self._session_len - tokens
        config.max_new_tokens = min(config.max_new_tokens, left)
        ends = import_module("transformers").StoppingCriteriaList([self._ends])
        try:
            if left > 0:
                answer = self._model.generate(**keywords, stopping_criteria=ends)
                self._answered, self._shortages = self._answered + 1, 0
                return answer
            self.failure = Refusal("bad_request:prompt", tokens=tokens, most=self._session_len)
        except torch.OutOfMemoryError as exc:
            self.ran_short(exc)
        except RuntimeError as exc:
            traceback.print_exception(exc)
            if "CUDA error" in str(exc):  # the context is lost, and every later call with it
                self.fatal = f"RuntimeError: {one_line(exc)}"
            self.failure = Refusal("engine_failed", said=one_line(exc))
        finally:
            self.idle.set()
        if self.failure.reason == "out_of_memory":
            torch.cuda.empty_cache()
        raise self.failure

    def _ends(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
        """Whether each row ends; asked after each token."""
        self._moved = time.monotonic()
        shape, ends = (input_ids.shape[0],), self.cancelled.is_set()
        torch = import_module("torch")
        return torch.full(shape, ends, dtype=torch.bool, device=input_ids.device)

    def ran_short(self, exc: BaseException) -> Refusal:
        """A request ran out of GPU memory; what its client is told.

        After torch's exception the engine can go on. But an engine that has never answered, or that
        runs out again and again, would do so for ever: it ends with torch's message, from which the
        supervisor plans anew.
        """
        self._shortages += 1
        if not self._answered or self._shortages >= _MOST_SHORT:
            self.fatal = f"torch.OutOfMemoryError: {one_line(exc)}"
        self.failure = Refusal("out_of_memory", said=one_line(exc), retry_after=_RETRY_SECONDS)
        return self.failure


def one_line(exc: BaseException) -> str:
    """What an exception says, in one line of a bounded length."""
    return " ".join(str(exc).split())[:_SHOWN] or type(exc).__name__


def find_inside() -> dict[str, Any]:
    """Transformers' own classes by their names, checked, and its version; takes seconds.

    Raises:
        PackageError: Transformers or what its server needs is missing, or is another inside.
    """
    hint = f"{install_command('fallback')} (transformers {_TRIED} were tried)"
    try:
        for name in ("torch", "transformers", "accelerate", "fastapi", "openai"):
            import_module(name)
    except ImportError as exc:
        raise PackageError(
            f"the fallback engine needs {name}, which cannot be imported: {exc}", hint=hint
        ) from None
    version = import_module("transformers").__version__
    found: dict[str, Any] = {"version": version}
    try:
        for part, name, method, given in _USED:
            found[name] = getattr(import_module(f"transformers.cli.serving.{part}"), name)
            taken = inspect.signature(getattr(found[name], method)).parameters
            if missing := set(given.split()) - set(taken):
                raise AttributeError(f"{name}.{method} takes no {', '.join(sorted(missing))}")
    except (ImportError, AttributeError) as exc:
        raise PackageError(
            f"transformers {version} has another server inside than the fallback engine knows: "
            f"{exc}",
            hint=hint,
        ) from None
    return found


def load(options: GenerationOptions) -> tuple[ServedModel, Any]:
    """The model and its processor. Takes as long as it takes.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: Transformers refuses the model or the map.
    """
    processor = load_processor(options.model)
    tokenizer = getattr(processor, "tokenizer", None)
    if not getattr(processor, "chat_template", None) and tokenizer is not None:
        processor.chat_template = tokenizer.chat_template  # where older checkpoints keep it
    model = load_model(
        options.model,
        device_map=dict(options.device_map),
        dtype=getattr(import_module("torch"), options.dtype),
        attn_implementation="sdpa",
        offload_folder=options.offload,
    )
    return ServedModel(model, options.session_len), processor


def make_handlers(
    inside: Mapping[str, Any], options: GenerationOptions, model: ServedModel, processor: Any
) -> dict[str, Any]:
    """Transformers' handlers, by the kinds of their routes.

    Args:
        inside: Transformers' classes.
        options: what is served.
        model: answers their requests.
        processor: the model's.
    """
    base: Any = inside["GenerateManager"]

    class Generating(base):  # type: ignore[misc]
        """Marks the model as busy on the event loop: a wait for its end must not begin before."""

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            model.start()
            return super().submit(*args, **kwargs)

        def async_submit(self, *args: Any, **kwargs: Any) -> Any:
            model.start()
            return super().async_submit(*args, **kwargs)

    generating, state = Generating(), inside["GenerationState"]()
    state.get_manager = lambda model_id, use_cb=False: generating  # noqa: ARG005 - one for all
    whole = model._model
    modality = inside["ModelManager"].get_model_modality(whole, processor=processor)
    manager = SimpleNamespace(get_model_modality=lambda *_, **__: modality)
    served = (options.name, model, processor)
    return {
        kind: _handler_class(kind, base, served, options.session_len)(
            model_manager=manager, generation_state=state
        )
        for kind, base in (
            ("chat", inside["ChatCompletionHandler"]),
            ("completions", inside["CompletionHandler"]),
        )
    }


def _handler_class(kind: str, base: Any, served: tuple[str, Any, Any], session_len: int) -> Any:
    """Serves one model, reads what is held of a body alone, and decodes images itself.

    Transformers' own loader of images takes any address or file, and its decoders differ with what
    is installed. Its sampling is the model's own default, not what a temperature asks for.
    """
    from PIL import Image

    class Handler(base):  # type: ignore[misc]
        def _validate_request(self, body: Any) -> None:
            lengths = [body[name] for name in ANSWER_LENGTHS[kind] if name in body]
            for name in set(body) - _READ[kind]:
                del body[name]
            if biases := body.pop("logit_bias", None):  # Transformers takes no empty or whole ones
                body["logit_bias"] = {token: float(bias) for token, bias in biases.items()}
            body["max_tokens"] = min([*lengths[:1], session_len])

        def _resolve_model(self, _body: Any) -> Any:
            return served

        @staticmethod
        def get_processor_inputs_from_messages(messages: Any, modality: Any) -> Any:
            made = base.get_processor_inputs_from_messages(messages, modality)
            for message in made:
                parts = message["content"] if isinstance(message["content"], list) else []
                for part in parts:
                    if part["type"] == "image":
                        data = base64.b64decode(part.pop("url").partition(",")[2])
                        part["image"] = Image.open(io.BytesIO(data)).convert("RGB")
            return made

        def _build_generation_config(self, body: Any, *args: Any, **kwargs: Any) -> Any:
            config = super()._build_generation_config(body, *args, **kwargs)
            if body.get("temperature") is not None:
                config.do_sample = body["temperature"] > 0
            return config

    return Handler
