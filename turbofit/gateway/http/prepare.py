"""From the bytes of a body to the bytes that an engine is given, and what they will cost it."""

from __future__ import annotations

from codecs import BOM_UTF8
from typing import TYPE_CHECKING, Any

import msgspec

from turbofit.core.struct import Struct
from turbofit.gateway.http.bodies import Parsed, read_body
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.cost import UNSTATED
from turbofit.gateway.limits.parameters import passed
from turbofit.gateway.limits.ranges import hold_parameters, lower_answer, scope_of
from turbofit.gateway.limits.request_limits import (
    KNOBS,
    LimitedImage,
    check_images,
    check_request,
    check_texts,
    shown,
)
from turbofit.gateway.limits.reservation import most_tokens
from turbofit.gateway.limits.sharing import (
    RequestedImage,
    beside_images,
    by_request,
    hold_images,
    request_bounds,
    within,
)
from turbofit.gateway.limits.video_limits import check_clips, hold_clip
from turbofit.gateway.media.clips import Clip
from turbofit.gateway.media.pictures import Picture, from_base64, from_bytes, from_url

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.gateway.http.bodies import MediaSlot
    from turbofit.gateway.http.routes import Kind
    from turbofit.gateway.limits.request_limits import Bounds

__all__ = [
    "Media", "PreparedBody", "decode", "finish", "hold", "inlined", "is_remote", "remote_urls",
    "start",
]  # fmt: skip


class PreparedBody(Struct):
    """What a request that is passed on will cost, and what was changed in it.

    ``units`` and ``host_bytes`` are those of all its copies together; ``tokens`` are image tokens
    of one, ``kv_tokens`` the most that one can hold of the cache. ``lowered`` is what the client is
    told.
    """

    images: int = 0
    copies: int = 1
    units: int = 0
    tokens: int = 0
    host_bytes: int = 0
    kv_tokens: int = 0
    lowered: tuple[str, ...] = ()


class Media(Struct):
    """The images and videos of a request in their order, and what each is held to."""

    media: tuple[Picture | Clip, ...]
    limited: tuple[LimitedImage, ...]

    @property
    def payload(self) -> int:
        """Characters of all of them in a body."""
        return sum(medium.payload for medium in self.media)


def start(bounds: Bounds, kind: Kind, raw: bytes) -> Parsed:
    """Decode a body, hold its parameters, find its images and refuse what their number forbids.

    Raises:
        Refusal: not JSON, not this API's shape, a parameter out of its range, too many images, or
            videos that nobody planned for.
    """
    parsed = read_body(kind, decode(raw))
    parsed.lowered += hold_parameters(kind, parsed.body, scope_of(bounds))
    check_clips(bounds, sum(slot.shape == "clip" for slot in parsed.slots))
    check_images(bounds, len(parsed.slots))
    if kind == "encode":
        check_texts(bounds, parsed.body["input"])
    elif kind != "count_tokens":
        check_request(bounds, (), n=parsed.copies)
    return parsed


def remote_urls(parsed: Parsed) -> list[str]:
    """Addresses that must be fetched first, each once."""
    urls = [slot.source for slot in parsed.slots if is_remote(slot)]
    return list(dict.fromkeys(urls))


def inlined(bounds: Bounds, parsed: Parsed, fetched: Mapping[str, bytes], came: int) -> int:
    """Bytes that the files of `remote_urls` add to a body of ``came`` bytes.

    A file that stands in several places is written into each.

    Raises:
        Refusal: the body would be larger than one may be that holds the same files inline.
    """
    files = [len(fetched[slot.source]) for slot in parsed.slots if is_remote(slot)]
    added = sum(-(-size // 3) * 4 for size in files)
    if files:
        check_body(bounds, came + added)
    return added


def check_body(bounds: Bounds, size: int) -> None:
    """Hold a body with its remote images to the bytes of one.

    Raises:
        Refusal: it is larger.
    """
    most = bounds.limits.bytes_per_body
    if size > most:
        raise Refusal("body_too_big:fetched", size=size, most=most)


def is_remote(slot: MediaSlot) -> bool:
    """Whether an image lies elsewhere."""
    return not slot.inline and slot.source[:8].lower().startswith(("http://", "https://"))


def hold(
    bounds: Bounds,
    kind: Kind,
    parsed: Parsed,
    fetched: Mapping[str, bytes] | None = None,
    clip: Clip | None = None,
) -> Media:
    """Hold every image and video to the plan, and all of them together.

    Args:
        bounds: the plan's.
        kind: of route.
        parsed: what `start` gave.
        fetched: the files of `remote_urls`.
        clip: the request's video, as `films.VideoInspector` sees it.

    Raises:
        Refusal: what no lowering can bring within the plan.
    """
    media = [
        clip if clip and slot.shape == "clip" else _picture(bounds, slot, fetched or {})
        for slot in parsed.slots
    ]
    wanted = _wanted(bounds, kind, parsed, media)
    shared = hold_images(bounds, wanted)
    films = [medium for medium in media if not isinstance(medium, Picture)]
    limited = [_limited_clip(bounds, parsed, film, shared.images) for film in films]
    if limited and not within(bounds, (*limited, *shared.images)):
        shared = hold_images(bounds, wanted, limited)
    if shared.request:
        parsed.body.setdefault("mm_processor_kwargs", {})["image"] = shared.request
    clips, images = iter(limited), iter(shared.images)
    every = tuple(next(images if isinstance(one, Picture) else clips) for one in media)
    if kind != "count_tokens":
        check_request(bounds, every, n=parsed.copies)
        taken = sum(one.tokens + one.text_tokens for one in every)
        left = bounds.longest_request_tokens - taken
        parsed.lowered += lower_answer(kind, parsed.body, left)
    return Media(media=tuple(media), limited=every)


def finish(bounds: Bounds, kind: Kind, parsed: Parsed, found: Media) -> tuple[bytes, PreparedBody]:
    """Write every image back inline and encode the body.

    Args:
        bounds: the plan's.
        kind: of route.
        parsed: what `start` gave.
        found: what `hold` gave, its pictures resized where it says so.

    Returns:
        The body for the engine, and what it costs.

    Raises:
        Refusal: too much text beside the images.
    """
    for slot, medium, one in zip(parsed.slots, found.media, found.limited, strict=True):
        if isinstance(medium, Picture):
            slot.fill(medium, one.knobs)
        else:
            slot.show(medium)
    body = _encode(parsed.body)
    # Where tokens are counted, the images are not passed on: what is there is text alone.
    beside = len(body) - (0 if kind == "count_tokens" else found.payload)
    if beside > bounds.beside_images:
        raise Refusal("text_too_big:beside", beside=beside, most=bounds.beside_images)
    prepared = _prepared(bounds, kind, parsed, found)
    if bounds.gate is not None and prepared.kv_tokens:
        tokens = sum(one.tokens + one.text_tokens for one in found.limited)
        most = most_tokens(kind, parsed.body, body, beside, tokens)
        prepared = msgspec.structs.replace(prepared, kv_tokens=most)
    return body, prepared


def _prepared(bounds: Bounds, kind: Kind, parsed: Parsed, found: Media) -> PreparedBody:
    media, limited = found.media, found.limited
    units = sum(one.units for one in limited)
    decoded = sum(
        medium.decoded_bytes * one.frames for medium, one in zip(media, limited, strict=True)
    )
    lowered = [*parsed.lowered, *(word for one in limited for word in one.lowered)]
    generates = kind not in ("count_tokens", "encode")
    # Counting tokens encodes no image: only their text is passed on.
    copies = parsed.copies if generates else 0
    return PreparedBody(
        images=len(media),
        copies=parsed.copies,
        units=units * copies,
        tokens=sum(one.tokens for one in limited),
        host_bytes=(decoded + units * bounds.bytes_per_unit) * copies,
        kv_tokens=UNSTATED if generates else 0,
        lowered=tuple(dict.fromkeys(lowered)),
    )


def _picture(bounds: Bounds, slot: MediaSlot, fetched: Mapping[str, bytes]) -> Picture:
    most = bounds.limits.bytes_per_image
    if slot.inline:
        return from_base64(slot.source, most)
    if is_remote(slot):
        return from_bytes(fetched[slot.source], most)
    return from_url(slot.source, most)


def _wanted(
    bounds: Bounds, kind: Kind, parsed: Parsed, media: Sequence[Picture | Clip]
) -> list[RequestedImage]:
    """The images of a request, with what the client asks of each, or of all of them together."""
    together = by_request(bounds) and "mm_processor_kwargs" in passed(kind)
    if parsed.of_images and not (together and any(isinstance(one, Picture) for one in media)):
        parsed.lowered.append("mm_processor_kwargs=image->none")
    of_all = request_bounds(bounds, parsed.of_images) if together else {}
    wanted = []
    for slot, medium in zip(parsed.slots, media, strict=True):
        if not isinstance(medium, Picture):
            continue
        if together:
            unread = [name for name in KNOBS if name in slot.options]
            parsed.lowered += [f"{name}={shown(slot.options[name])}->default" for name in unread]
        options = of_all if together else slot.options
        wanted.append(
            RequestedImage(
                size=medium.size, options=options, carries=slot.carries, by_request=together
            )
        )
    return wanted


def _limited_clip(
    bounds: Bounds, parsed: Parsed, clip: Clip, images: Sequence[LimitedImage]
) -> LimitedImage:
    """A video beside images; what holds it goes into the body itself."""
    limited, keywords = hold_clip(beside_images(bounds, images), clip, parsed.watching)
    parsed.body.update(keywords)
    return limited


def decode(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw.removeprefix(BOM_UTF8))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Refusal("bad_json:text") from None


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        raise Refusal("bad_json:numbers") from None
