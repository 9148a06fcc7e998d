"""Subclasses of ``transformers serve``'s parts: explicit map, prompt cap, cancelling, sampling."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from turbofit.memory.transformers.components import load_model, load_processor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.launch.fallback.private import TransformersInternals
    from turbofit.launch.fallback.work import ServedWork

__all__ = ["GenerationOptions", "inner_app"]


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


def inner_app(inside: TransformersInternals, options: GenerationOptions, work: ServedWork) -> Any:
    """Load the model, and build Transformers' own application around it. Takes as long as it takes.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: Transformers refuses the model or the map.
    """
    manager = _manager_class(inside, options)(
        device="cpu", dtype=options.dtype, attn_implementation="sdpa", force_model=options.name
    )
    state = inside.state()
    generating = _generating_class(inside, options, work)()
    state.get_manager = lambda model_id, use_cb=False: generating  # noqa: ARG005 - one for all
    chat = _handler(inside.chat)(model_manager=manager, generation_state=state)
    completions = _handler(inside.completions)(model_manager=manager, generation_state=state)
    # Handlers of routes that are closed, of which releases have more and more.
    parameters = inspect.signature(inside.build_server).parameters.values()
    others = {one.name: None for one in parameters if one.default is one.empty}
    given = {
        "model_manager": manager,
        "chat_handler": chat,
        "completion_handler": completions,
        "generation_state": state,
    }
    return inside.build_server(**{**others, **given})


def _manager_class(inside: TransformersInternals, options: GenerationOptions) -> Any:
    """Loads one model, through public interfaces, under the name that clients use."""
    base: Any = inside.manager

    class Manager(base):  # type: ignore[misc]
        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def _load_processor(self, *_: Any, **__: Any) -> Any:
            found = load_processor(options.model)
            inner = getattr(found, "tokenizer", None)
            if not getattr(found, "chat_template", None) and inner is not None:
                found.chat_template = inner.chat_template  # where older checkpoints keep it
            return found

        def _load_model(self, *_: Any, **__: Any) -> Any:
            return load_model(
                options.model,
                device_map=dict(options.device_map),
                dtype=self.dtype,
                attn_implementation="sdpa",
                offload_folder=options.offload,
            )

    return Manager


def _handler(base: Any) -> Any:
    """Decodes images itself, and samples where a temperature asks for it.

    The model's own default would decide otherwise. The server's own loader takes any address or
    file, and its decoders differ with what is installed; Pillow's errors are the client's.
    """

    class Handler(base):  # type: ignore[misc]
        @staticmethod
        def get_processor_inputs_from_messages(messages: Any, modality: Any) -> Any:
            made = base.get_processor_inputs_from_messages(messages, modality)
            for message in made:
                parts = message["content"] if isinstance(message["content"], list) else []
                for part in parts:
                    if part.get("type") == "image":
                        part["image"] = _decoded(part.pop("url"))
            return made

        def _build_generation_config(self, body: Any, *args: Any, **kwargs: Any) -> Any:
            config = super()._build_generation_config(body, *args, **kwargs)
            if body.get("temperature") is not None:
                config.do_sample = float(body["temperature"]) > 0
            return config

    return Handler


def _decoded(url: str) -> Any:
    """The image of a ``data:`` address.

    Raises:
        ValueError: it is no base64, or no image.
    """
    import base64
    import io

    from PIL import Image

    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as exc:
        raise ValueError(f"an image cannot be decoded: {exc}") from None


def _generating_class(
    inside: TransformersInternals, options: GenerationOptions, work: ServedWork
) -> Any:
    """Generates under a cap, and can be stopped."""
    base: Any = inside.generating

    class Generating(base):  # type: ignore[misc]
        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any
        ) -> Any:
            _cap(inputs, gen_config, options)
            guarded = _Guarded(model, work)
            try:
                return super().generate_streaming(guarded, processor, inputs, gen_config, **more)
            except Exception:
                work.done()  # nothing was begun
                raise

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any
        ) -> Any:
            _cap(inputs, gen_config, options)
            guarded = _Guarded(model, work)
            try:
                return await super().generate_non_streaming(
                    guarded, processor, inputs, gen_config, **more
                )
            except Exception:
                work.done()  # by now it has ended, or was never begun
                raise

    return Generating


def _cap(inputs: Any, config: Any, options: GenerationOptions) -> None:
    """Refuse a prompt that leaves no room for an answer; end the answer where the room ends.

    Raises:
        HTTPException: 400, as the server's own refusals.
    """
    from fastapi import HTTPException

    tokens = int(inputs["input_ids"].shape[-1])
    if tokens >= options.session_len:
        raise HTTPException(
            status_code=400,
            detail=f"the prompt has {tokens} tokens, images included, and this server's context "
            f"is {options.session_len} for prompt and answer",
        )
    room = options.session_len - tokens
    wanted = config.max_new_tokens
    config.max_new_tokens = room if wanted is None else max(1, min(int(wanted), room))


class _Guarded:
    """A model whose ``generate`` can be stopped, reports each token, and fails in one line."""

    def __init__(self, model: Any, work: ServedWork) -> None:
        self._model, self._work = model, work
        work.start()  # on the event loop: a wait for the end must not begin before it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **keywords: Any) -> Any:
        """As the model's own."""
        import torch

        library: Any = torch
        try:
            found = self._model.generate(**keywords, stopping_criteria=_criteria(self._work))
        except library.OutOfMemoryError as exc:
            self._work.ran_short(_plain(str(exc)))
            raise RuntimeError(_plain(f"out of GPU memory: {exc}")) from None
        except RuntimeError as exc:
            if "CUDA error" in str(exc):  # the context is lost, and every later call with it
                self._work.fatal = f"RuntimeError: {_plain(str(exc))}"
            _say_failure(exc)
            raise RuntimeError(_plain(str(exc))) from exc
        else:
            self._work.answered()
            return found
        finally:
            if self._work.short:
                library.cuda.empty_cache()
            self._work.done()


def _criteria(work: ServedWork) -> Any:
    """Looked at after each token."""
    import transformers

    library: Any = transformers
    base: Any = library.StoppingCriteria

    class Cancelled(base):  # type: ignore[misc]
        def __call__(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
            import torch

            work.moved()
            full: Any = torch.full
            stop = work.cancelled.is_set()
            return full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)

    return library.StoppingCriteriaList([Cancelled()])


def _plain(text: str) -> str:
    """On one line and without what JSON escapes: the server puts it into JSON by hand."""
    quoted = json.dumps(" ".join(text.replace('"', "'").replace("\\", "/").split()))
    return quoted[1:-1]


def _say_failure(exc: BaseException) -> None:
    """The traceback, for the log."""
    import sys
    import traceback

    traceback.print_exception(exc, file=sys.stderr)
