"""LMDeploy's pipeline, which keeps the limits of a plan here.

This module imports LMDeploy, so import the module late.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import inspect
import logging
import warnings
from asyncio import to_thread
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, Final
from weakref import finalize, ref

from lmdeploy import Pipeline
from lmdeploy.serve.processors import MultimodalProcessor
from msgspec.structs import replace

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.images import ImageRule
from turbofit.core.installation import install_command
from turbofit.core.plan import Plan
from turbofit.core.struct import Options
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import UNSTATED, Cost, Gate
from turbofit.gateway.limits.ranges import GENERATION, RULES, hold_fields, scope_of
from turbofit.gateway.limits.request_limits import (
    KNOBS,
    Bounds,
    LimitedImage,
    RequestedImage,
    check_images,
    check_request,
    planned_limit,
)
from turbofit.gateway.limits.rules import Scope
from turbofit.gateway.limits.sharing import (
    by_request,
    check_clips,
    hold_frames,
    hold_media,
    request_bounds,
)
from turbofit.gateway.media.pictures import resized_image
from turbofit.serving.images.preparation import prepare, threads_here
from turbofit.serving.leases import Leases
from turbofit.serving.plan_gateway import bounds_of

_LOG: Final = logging.getLogger(__name__)
#: Parameters of ``preprocess`` that `Pipeline` passes by itself.
_GIVEN: Final = ("messages", "session_id", "input_ids")
#: Keywords of `Pipeline.infer`, `.stream_infer` and `.chat` that do not reach the engine.
_OF_CALLS: Final = ("sessions", "stream_response", "multiplex")
_REQUEST: Final[ContextVar[_Request]] = ContextVar("request")
_IMAGES: Final = ("image", "image_url", "image_data")
#: lmdeploy vl/media/connection.py::_load_http_url #148975
_BLOCKED: Final = "URL is blocked"
_VIDEOS: Final = ("video", "video_url")


def hold_config(config: Any, scope: Scope) -> Any:
    """Return a copy of a GenerationConfig, with values lowered to the plan's limits.

    A warning names the lowered values. Fields of a later LMDeploy, which `GENERATION` lacks, do not
    change.
    """
    result = copy.copy(config)
    fields = {name: value for name, value in vars(result).items() if value is not None}
    fields = {name: value for name, value in fields.items() if name in GENERATION}
    changes = hold_fields(GENERATION, fields, scope)
    vars(result).update(fields)
    if changes:
        warnings.warn(f"lowered to the engine's range: {', '.join(changes)}", stacklevel=2)
    return result


def check_keywords(engine: Any, keywords: Options) -> None:
    """Refuse keywords of a call that LMDeploy drops in silence.

    Raises:
        UsageError: LMDeploy drops a keyword; the hint names the right place of its value.
    """
    named = inspect.signature(engine.preprocess).parameters.values()
    known = [p.name for p in named if p.kind is not p.VAR_KEYWORD and p.name not in _GIVEN]
    for name, value in keywords.items():
        if name in known or name in _OF_CALLS:
            continue
        hint = f"the keywords of a call are {', '.join(known)}"
        if name in GENERATION:
            hint = f"give gen_config=GenerationConfig({name}={value!r}), from lmdeploy"
        raise UsageError(f"LMDeploy drops {name}={value!r} of a pipeline's call", hint=hint)


def _log(error: Any) -> None:
    """Log LMDeploy's error of a request, by its name: LMDeploy answers with an empty text.

    The words of a cause are left out, unless they are turbofit's own: they may hold a person's
    text, picture or signed address.
    """
    cause = error.__cause__
    ours = cause is None or isinstance(cause.__cause__, Refusal)
    words = error.message if ours else type(cause).__name__
    if error.message.startswith(_BLOCKED):  # the rest may hold the URL
        words = f"{_BLOCKED}: its host is unknown, or has no public address"
    _LOG.warning("a request is refused (%s): %s", error.code.value, words)


def hold_engine(engine: Any, scope: Scope) -> None:
    """Check each request to LMDeploy's ``AsyncEngine``, and lower values to the plan's limits.

    A refused request gets the error as its answer. The log names each error, LMDeploy's own, too.
    """
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    preprocess = engine.preprocess
    signature = inspect.signature(preprocess)

    @wraps(preprocess)
    async def holding(*arguments: Any, **keywords: Any) -> Any:
        """Hold a request's parameters to their ranges, then preprocess the request."""
        call = signature.bind(*arguments, **keywords)
        config, ids = call.arguments.get("gen_config"), call.arguments.get("input_ids")
        try:
            if config is not None:
                call.arguments["gen_config"] = hold_config(config, scope)
            if ids is not None:
                RULES["generate"]["input_ids"].hold("input_ids", list(ids), scope)
            return await preprocess(*call.args, **call.kwargs)
        except Refusal as refusal:
            error = RequestError(ErrorCode.INVALID_REQUEST, refusal.message)
            _log(error)
            raise error from None
        except RequestError as exc:
            _log(exc)
            raise

    engine.preprocess = holding


def queued(
    generate: Callable[..., AsyncIterator[Any]], gate: Gate, units: int
) -> Callable[..., AsyncIterator[Any]]:
    """Return ``AsyncEngine.generate`` with a queue, in which requests wait for room in the engine.

    The first argument of the function is the preprocessed request. A request with images counts as
    ``units``, the most vision units of a request. A later request that needs less room may overtake
    a waiting request.
    """
    room = asyncio.Event()

    def look_again() -> None:
        """Wake the waiting requests, which look for room in order of arrival."""
        nonlocal room
        # Each event wakes its waiters once; requests that wait on need a new event.
        room.set()
        room = asyncio.Event()

    async def with_room(request: Any, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        """Wait for room in the engine, then pass the engine's answer on."""
        cost = _cost(request, units)
        while not gate.fits(cost):
            await room.wait()
        share, begun = gate.take(cost), False
        try:
            async with aclosing(generate(request, *arguments, **keywords)) as answer:  # type: ignore[type-var]
                async for item in answer:
                    if not begun:
                        begun = True
                        gate.begin(share)
                        look_again()
                    yield item
        finally:
            # LMDeploy's generator ends when the engine has dropped the request.
            gate.end(share)
            look_again()

    return with_room


def _cost(request: Any, units: int) -> Cost:
    """Return the vision units and tokens that a preprocessed request will hold."""
    inputs = getattr(request, "inputs", None)
    images = inputs is None or bool(inputs.get("multimodal"))
    prompt = getattr(request, "input_token_len", None)
    answer = getattr(getattr(request, "gen_config", None), "max_new_tokens", None)
    return Cost(
        units=units if images else 0,
        tokens=UNSTATED if prompt is None or answer is None else prompt + answer,
    )


class _Request:
    """LMDeploy's ``mm_processor_kwargs`` of the current request.

    ``image`` and ``video`` are the caller's values; ``processor_kwargs`` are the allowed values.
    """

    def __init__(self, image: Any = None, video: Any = None) -> None:
        self.image = image
        max_pixels = video.get("max_pixels") if isinstance(video, dict) else None
        self.video_pixels: int = max_pixels if isinstance(max_pixels, int) else 0
        self.processor_kwargs: dict[str, dict[str, int]] = {}


class PlannedProcessor(MultimodalProcessor):  # type: ignore[misc]  # LMDeploy has no types
    """LMDeploy's prompt processor ``base``, which limits images before any tiling.

    ``bounds`` are the plan's limits, as in the gateway.
    """

    def __init__(self, base: MultimodalProcessor, bounds: Bounds) -> None:
        self.__dict__.update(vars(base))
        self._bounds = bounds

    async def get_prompt_input(
        self, prompt: Any, *arguments: Any, mm_processor_kwargs: Any = None, **keywords: Any
    ) -> Any:
        """Call LMDeploy's method, with the processor keywords that the plan allows."""
        options = mm_processor_kwargs if isinstance(mm_processor_kwargs, dict) else {}
        request = _Request(image=options.get("image"), video=options.get("video"))
        _REQUEST.set(request)
        return await super().get_prompt_input(
            prompt, *arguments, mm_processor_kwargs=request.processor_kwargs, **keywords
        )

    async def async_parse_multimodal_item(
        self, messages: Any, *arguments: Any, **keywords: Any
    ) -> Any:
        """Refuse too many images with a `ValueError` before images load; limit each image."""
        try:
            check_clips(self._bounds, _count(messages, _VIDEOS))
            check_images(self._bounds, _count(messages, _IMAGES + _VIDEOS))
            parsed = await MultimodalProcessor.async_parse_multimodal_item(
                messages, *arguments, **keywords
            )
            parts: list[dict[str, Any]] = []
            for message in parsed:
                content = message.get("content")
                if message.get("role") in ("user", "tool") and isinstance(content, list):
                    message["content"] = [dict(part) for part in content]
                    parts += message["content"]
            await self._hold(parts)
        except Refusal as refusal:
            raise ValueError(refusal.message) from refusal
        return parsed

    async def _hold(self, parts: list[dict[str, Any]]) -> None:
        """Limit all images and videos of a request, in place; raise a `Refusal` beyond the plan."""
        images = [part for part in parts if part.get("type") == "image" and "data" in part]
        videos = [part for part in parts if part.get("type") == "video"]
        request = _REQUEST.get()
        # Some models take one limit for all images of a request, others a limit for each image.
        together = by_request(self._bounds)
        of_all = request_bounds(self._bounds, request.image) if together else {}
        wanted = [
            RequestedImage(
                size=part["data"].size, options=of_all if together else part, by_request=together
            )
            for part in images
        ]
        limit_video = partial(self._limited_frames, videos[0]["data"], request) if videos else None
        limited, clips = hold_media(self._bounds, wanted, limit_video)
        check_request(self._bounds, (*clips, *limited.images))
        if limited.request:
            request.processor_kwargs["image"] = limited.request
        for part, image in zip(images, limited.images, strict=True):
            for name in KNOBS:
                part.pop(name, None)
            part.update(image.knobs)
            if image.resize is not None:
                part["data"] = await to_thread(resized_image, part["data"], image.resize)

    @staticmethod
    def _limited_frames(frames: Any, request: _Request, bounds: Bounds) -> LimitedImage:
        """Limit a video with the shape (frames, height, width, 3) or (frames, 3, height, width)."""
        count, *sides = (int(side) for side in frames.shape)
        height, width = sides[:2] if sides[-1] == 3 else sides[1:]
        limited, least, most = hold_frames(bounds, count, (width, height), request.video_pixels)
        request.processor_kwargs["video"] = {"min_pixels": least, "max_pixels": most}
        return limited


class PlannedPipeline(Pipeline):  # type: ignore[misc]  # LMDeploy has no types
    """An `lmdeploy.Pipeline` that holds its requests and images to a plan.

    The pipeline closes itself when Python ends. ``leases`` reserves the pipeline's memory until the
    pipeline is closed or collected; ``leases`` is None for GPUs of another machine. In addition to
    the memory in use, other turbofits count the whole need of a loading pipeline, and the whole
    growth of a ready pipeline. ``keywords`` are LMDeploy's.
    """

    def __init__(
        self, plan: Plan, model_path: str, leases: Leases | None = None, **keywords: Any
    ) -> None:
        #: Ends the lease; also called when the pipeline is collected. None without a lease.
        self._end_lease = finalize(self, leases.close) if leases is not None else None
        super().__init__(model_path, **keywords)
        self.plan, self._open = plan, True
        atexit.register(_close, ref(self))
        try:
            if leases is not None:
                leases.note([], ready=True)
            self._hold(plan)
        except BaseException:
            self.close()  # the caller gets no pipeline to close
            raise

    def _hold(self, plan: Plan) -> None:
        """Hold the engine to the plan; raise a `PackageError` if this LMDeploy lacks a hook."""
        bounds = bounds_of(plan, overlay=False)
        hold_engine(self.async_engine, scope_of(bounds))
        processor = self.async_engine.prompt_processor
        if bounds.rule is None or processor.vl_encoder is None:
            return
        if not hasattr(type(processor), "async_parse_multimodal_item"):
            raise PackageError(
                "this version of LMDeploy has no known place for limits of images",
                hint=f"install a known one with {install_command('lmdeploy', upgrade=True)}",
            )
        bounds = _hold_processor(processor.vl_encoder.model, bounds, bounds.rule)
        # As with `serve`, but Pillow resizes, since the process belongs to the user.
        threads, encoder = threads_here(plan), processor.vl_encoder
        if threads > 1 and (why := prepare(encoder, threads, plan.host.image_cache)):
            warnings.warn(f"images are prepared in LMDeploy's own way: {why}", stacklevel=2)
        self.async_engine.prompt_processor = PlannedProcessor(processor, bounds)
        if bounds.gate is not None:
            gate = Gate(bounds.gate, bounds.engine_bounds(0, 1).kv)
            units = min(bounds.gate, bounds.limits.units_per_request)
            self.async_engine.generate = queued(self.async_engine.generate, gate, units)

    def _request_generator(self, *arguments: Any, **keywords: Any) -> Any:
        """Check the keywords of each kind of call; raise a `UsageError` for a wrong keyword."""
        check_keywords(self.async_engine, keywords)
        return super()._request_generator(*arguments, **keywords)

    def close(self) -> None:
        """Close LMDeploy's pipeline, then end the lease of its memory, even if closing fails."""
        if not self._open:
            return
        self._open = False
        try:
            super().close()
        finally:
            if self._end_lease is not None:
                self._end_lease()


def _close(pipeline: ref[PlannedPipeline]) -> None:
    """Close an open pipeline: TurboMind's threads may abort when Python ends."""
    still_open = pipeline()
    if still_open is not None:
        still_open.close()


def _count(messages: Any, kinds: tuple[str, ...]) -> int:
    """Return the number of images or videos in all messages of a chat, earlier messages included.

    A request encodes the images of all its messages.
    """
    listed = [messages] if isinstance(messages, dict) else messages
    return sum(
        1
        for message in listed
        if message.get("role") in ("user", "tool") and isinstance(message.get("content"), list)
        for item in message["content"]
        if isinstance(item, dict) and item.get("type") in kinds
    )


def _hold_processor(model: Any, bounds: Bounds, rule: ImageRule) -> Bounds:
    """Set the plan's image limit in a model's processor, and return bounds with this limit.

    InternVL in HF format needs this limit, since its processor reads no limit from a request. If a
    processor has no image limit, an image beyond the plan is refused before its encoding.
    """
    name = rule.processor_limit
    if name is None:
        return bounds
    most = min(planned_limit(bounds), rule.largest_limit(bounds.limits.units_per_image) or 1)
    setattr(model.processor.image_processor, name, most)
    return replace(bounds, promise=bounds.promise.with_image_limit(rule, most), overlay=True)
