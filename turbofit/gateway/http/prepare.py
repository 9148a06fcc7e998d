"""Turns the bytes of a client's body into the body for an engine, and computes its cost."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec

from turbofit.core.process.interpreter import in_thread
from turbofit.core.struct import Struct
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import Kind
from turbofit.gateway.limits.defaults import Defaults
from turbofit.gateway.limits.gate import STEP_SECONDS, UNSTATED, Cost
from turbofit.gateway.limits.ranges import (
    hold_parameters,
    lower_answer,
    most_tokens,
    passed_fields,
    scope_of,
    state_answer,
    stated_answer,
)
from turbofit.gateway.limits.request_body import MediaSlot, read_body
from turbofit.gateway.limits.request_limits import (
    KNOBS,
    Bounds,
    LimitedImage,
    RequestedImage,
    check_images,
    check_request,
    shown,
)
from turbofit.gateway.limits.rules import refused
from turbofit.gateway.limits.sharing import (
    by_request,
    check_clips,
    hold_clip,
    hold_media,
    request_bounds,
)
from turbofit.gateway.media.clips import Clip
from turbofit.gateway.media.fetch import about_url
from turbofit.gateway.media.pictures import (
    Picture,
    PicturePermits,
    from_base64,
    from_bytes,
    from_url,
    resized,
)


class PreparedBody(Struct):
    """Numbers of a prepared request, for its admission and its record.

    ``images`` is the number of images and videos, ``tokens`` their tokens in one copy of the
    request. ``lowered`` lists the values that were lowered to the plan.
    """

    images: int = 0
    tokens: int = 0
    cost: Cost = Cost()
    lowered: tuple[str, ...] = ()


class Preparation:
    """The steps that turn a client's body into the body for an engine.

    First the constructor adds the server's defaults and lowers the parameters to the plan. Then the
    caller calls `inlines`, `hold`, `resize` and `finish`, in this order. A step raises a `Refusal`
    if the request cannot be lowered to the plan.
    """

    def __init__(
        self, bounds: Bounds, kind: Kind, raw: bytes, defaults: Defaults | None = None
    ) -> None:
        self._bounds, self.kind, self._size = bounds, kind, len(raw)
        body = decode(raw)
        if defaults is not None and isinstance(body, dict):
            defaults.complete(kind, body)
        parsed = self.parsed = read_body(kind, body)
        #: The images and videos in the body's order, and the same media as limited by the plan.
        self.media: list[Picture | Clip] = []
        self.limited: tuple[LimitedImage, ...] = ()
        parsed.lowered += hold_parameters(kind, parsed.body, scope_of(bounds))
        check_clips(bounds, sum(slot.shape == "clip" for slot in parsed.slots))
        check_images(bounds, len(parsed.slots))
        if self.generates:
            check_request(bounds, (), n=parsed.copies)

    @property
    def generates(self) -> bool:
        return self.kind != "count_tokens"

    @property
    def payload(self) -> int:
        """The length of all images and videos in the body, in characters."""
        return sum(medium.payload for medium in self.media)

    def inlines(self, url: str, size: int) -> int:
        """Return the bytes by which a fetched file of ``size`` bytes makes the body longer.

        Each place of the body that names ``url`` gets the file in base64. This method adds the
        bytes to the counted size of the body.

        Raises:
            Refusal: the body would be larger than the limit.
        """
        added = sum(slot.source == url for slot in self.parsed.slots) * -(-size // 3) * 4
        self._size += added
        most = self._bounds.limits.bytes_per_body
        if self._size > most:
            raise Refusal("body_too_big:fetched", size=self._size, most=most)
        return added

    def hold(self, fetched: Mapping[str, bytes], clip: Clip | None) -> None:
        """Lower every image and video to the plan, each alone and all together.

        ``fetched`` has the fetched files by URL; ``clip`` is the video, if there is one.

        Raises:
            Refusal: an image or video cannot be used, or all media together exceed the plan.
        """
        bounds, parsed, kind = self._bounds, self.parsed, self.kind
        count = sum(slot.shape != "clip" for slot in parsed.slots)
        places = iter(range(1, count + 1))
        self.media = []
        for slot in parsed.slots:
            if clip is not None and slot.shape == "clip":
                self.media.append(clip)
                continue
            with _about_place(next(places), count):
                self.media.append(_picture(bounds, slot, fetched))
        watch = partial(self._watch, clip) if clip is not None else None
        shared, clips = hold_media(bounds, self._requested_images(), watch)
        if shared.request:
            parsed.body.setdefault("mm_processor_kwargs", {})["image"] = shared.request
        images = iter(shared.images)
        self.limited = tuple(
            next(images) if isinstance(medium, Picture) else clips[0] for medium in self.media
        )
        if self.generates:
            check_request(bounds, self.limited, n=parsed.copies)
            left = bounds.promise.context - self._media_tokens
            state_answer(kind, parsed.body, bounds.answer_tokens, parsed.lowered)
            lower_answer(kind, parsed.body, left, parsed.lowered)

    def _watch(self, clip: Clip, left: Bounds) -> LimitedImage:
        """Lower the video to the bounds ``left``, and write its parameters into the body.

        ``left`` are the bounds that the images of the request leave to the video.
        """
        video, keywords = hold_clip(left, clip, self.parsed.watching)
        self.parsed.body.update(keywords)
        return video

    async def resize(self, permits: PicturePermits) -> None:
        """Resize, in threads, the pictures that no parameter of the request can limit."""
        for place, (medium, limited) in enumerate(zip(self.media, self.limited, strict=True)):
            if limited.resize is not None and isinstance(medium, Picture):
                async with permits.of(medium.size):
                    self.media[place] = await in_thread(resized, medium, limited.resize)

    def finish(self, token_seconds: float = 0.0) -> tuple[bytes, PreparedBody]:
        """Return the body as JSON, with every image and video inline, and its `PreparedBody`.

        If the request only counts tokens, each image becomes an empty text. ``token_seconds`` is
        the price of the request's grammar (`grammar_trials`).

        Raises:
            Refusal: the body cannot be written, is too long, or has too many copies of a grammar.
        """
        bounds, kind, parsed = self._bounds, self.kind, self.parsed
        for slot, medium, limited in zip(parsed.slots, self.media, self.limited, strict=True):
            if isinstance(medium, Picture):
                slot.fill(medium, limited.knobs)
            else:
                slot.show(medium.url)
        try:
            body = msgspec.json.encode(parsed.body)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
            raise Refusal("bad_json:numbers") from None
        beside = self._beside_images(len(body))
        kv_tokens = UNSTATED if self.generates else 0
        if bounds.gate is not None and self.generates:  # only a gate needs the number
            kv_tokens = most_tokens(kind, parsed.body, body, beside, self._media_tokens)
        lowered = [*parsed.lowered, *(word for limited in self.limited for word in limited.lowered)]
        return body, PreparedBody(
            images=len(self.media),
            tokens=sum(limited.tokens for limited in self.limited),
            cost=self._cost(kv_tokens, token_seconds),
            lowered=tuple(dict.fromkeys(lowered)),
        )

    def _cost(self, kv_tokens: int, token_seconds: float) -> Cost:
        """Return the cost of all copies; refuse what no engine has room for.

        ``kv_tokens`` is the most tokens of one copy, ``token_seconds`` its grammar's price.
        """
        # A request that only counts tokens sends no image to an engine.
        bounds, copies = self._bounds, self.parsed.copies if self.generates else 0
        units = sum(limited.units for limited in self.limited)
        both = zip(self.media, self.limited, strict=True)
        decoded = sum(medium.decoded_bytes * limited.frames for medium, limited in both)
        host_bytes = (decoded + units * bounds.bytes_per_unit) * copies
        if host_bytes > bounds.host_bytes:
            raise Refusal("images_over_limit", size=host_bytes, most=bounds.host_bytes)
        if token_seconds * copies > STEP_SECONDS:
            most = int(STEP_SECONDS / token_seconds)
            raise refused("n", f"is {copies}; with this grammar the limit is {most}")
        return Cost(
            units=units * copies,
            host_bytes=host_bytes,
            tokens=kv_tokens,
            copies=self.parsed.copies,
            answer=stated_answer(self.kind, self.parsed.body) or 0,
            token_seconds=token_seconds * copies,
        )

    def _beside_images(self, body: int) -> int:
        """Return the bytes of the body without images, and refuse too many.

        ``body`` is the size of the whole body in bytes.
        """
        bounds, beside = self._bounds, body - (self.payload if self.generates else 0)
        if beside > (most := bounds.beside_images):
            key = "text_too_big" if most == bounds.text_bytes else "text_too_big:beside"
            context = bounds.promise.context
            raise Refusal(key, beside=beside, most=most, context=context)
        return beside

    @property
    def _media_tokens(self) -> int:
        return sum(limited.tokens + limited.text_tokens for limited in self.limited)

    def _requested_images(self) -> list[RequestedImage]:
        """Return the images, with the client's options for one image or for all together.

        Options that LMDeploy does not take for this model are noted as dropped.
        """
        bounds, parsed = self._bounds, self.parsed
        together = by_request(bounds) and "mm_processor_kwargs" in passed_fields(self.kind)
        pictures = [
            (slot, medium)
            for slot, medium in zip(parsed.slots, self.media, strict=True)
            if isinstance(medium, Picture)
        ]
        if parsed.of_images and not (together and pictures):
            parsed.lowered.append("mm_processor_kwargs=image->none")
        of_all = request_bounds(bounds, parsed.of_images) if together else {}
        if together:  # LMDeploy takes no options of single images
            parsed.lowered += [
                f"{name}={shown(slot.options[name])}->default"
                for slot, _ in pictures
                for name in KNOBS
                if name in slot.options
            ]
        return [
            RequestedImage(
                size=picture.size,
                options=of_all if together else slot.options,
                carries=slot.carries,
                by_request=together,
            )
            for slot, picture in pictures
        ]


@contextmanager
def _about_place(place: int, count: int) -> Iterator[None]:
    """Let a refusal's message begin with the image's place, if there are several images."""
    try:
        yield
    except Refusal as refusal:
        if count > 1:
            refusal.message = f"image {place} of {count}: {refusal.message}"
        raise


def _picture(bounds: Bounds, slot: MediaSlot, fetched: Mapping[str, bytes]) -> Picture:
    most = bounds.limits.bytes_per_image
    if slot.inline:
        return from_base64(slot.source, most)
    if slot.remote:
        with about_url(slot.source):
            return from_bytes(fetched[slot.source], most)
    return from_url(slot.source, most)


def decode(raw: bytes) -> Any:
    """Return the value of a JSON body.

    Raises:
        Refusal: the body is no JSON, or has a number that a float cannot represent.
    """
    try:
        return msgspec.json.decode(raw.removeprefix(BOM_UTF8))
    except msgspec.ValidationError:  # JSON allows the number, but no float can hold it
        raise Refusal("bad_json:range") from None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Refusal("bad_json:text") from None
