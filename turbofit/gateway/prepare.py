"""From the bytes of a body to the bytes that an engine is given, and what they will cost it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from turbofit.core.struct import Struct
from turbofit.gateway.bodies import Parsed, read_body
from turbofit.gateway.limits import Held, check_images, check_request, hold_image
from turbofit.gateway.pictures import Picture, from_base64, from_bytes, from_url
from turbofit.gateway.refusals import Refusal
from turbofit.gateway.watch import check_clips, hold_clip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.gateway.bodies import Slot
    from turbofit.gateway.clips import Clip
    from turbofit.gateway.limits import Bounds
    from turbofit.gateway.routes import Kind

__all__ = ["Prepared", "finish", "is_remote", "remote_urls", "start"]


class Prepared(Struct):
    """What a request that is passed on will cost, and what was changed in it.

    ``units`` and ``host_bytes`` are those of all its copies together; ``tokens`` are image tokens
    of one. ``lowered`` is what the client is told.
    """

    images: int = 0
    copies: int = 1
    units: int = 0
    tokens: int = 0
    host_bytes: int = 0
    lowered: tuple[str, ...] = ()


def start(bounds: Bounds, kind: Kind, raw: bytes) -> Parsed:
    """Decode a body, find its images and refuse what their number alone forbids.

    Raises:
        Refusal: not JSON, not this API's shape, too many images, or videos that nobody planned for.
    """
    parsed = read_body(kind, _decode(raw))
    check_clips(bounds, sum(slot.shape == "clip" for slot in parsed.slots))
    check_images(bounds, len(parsed.slots))
    if kind != "count_tokens":
        check_request(bounds, (), n=parsed.copies, max_tokens=parsed.max_tokens)
    return parsed


def remote_urls(parsed: Parsed) -> list[str]:
    """Addresses that must be fetched first, each once."""
    urls = [slot.source for slot in parsed.slots if is_remote(slot)]
    return list(dict.fromkeys(urls))


def is_remote(slot: Slot) -> bool:
    """Whether an image lies elsewhere."""
    return not slot.inline and slot.source[:8].lower().startswith(("http://", "https://"))


def finish(
    bounds: Bounds,
    kind: Kind,
    parsed: Parsed,
    fetched: Mapping[str, bytes] | None = None,
    clip: Clip | None = None,
) -> tuple[bytes, Prepared]:
    """Hold every image, write it back inline, check the whole and encode it.

    Args:
        bounds: the plan's.
        kind: of route.
        parsed: what `start` gave.
        fetched: the files of `remote_urls`.
        clip: the request's video, as `films.Films` sees it.

    Returns:
        The body for the engine, and what it costs.

    Raises:
        Refusal: what no lowering can bring within the plan.
    """
    media = [
        clip if clip and slot.shape == "clip" else _picture(bounds, slot, fetched or {})
        for slot in parsed.slots
    ]
    held = [
        _held(bounds, parsed, slot, medium)
        for slot, medium in zip(parsed.slots, media, strict=True)
    ]
    if kind != "count_tokens":
        check_request(bounds, held, n=parsed.copies, max_tokens=parsed.max_tokens)
    for slot, medium, one in zip(parsed.slots, media, held, strict=True):
        if isinstance(medium, Picture):
            slot.fill(medium, one.knobs)
        else:
            slot.show(medium)
    body = _encode(parsed.body)
    beside = len(body) - sum(medium.payload for medium in media)
    if beside > bounds.beside_images:
        raise Refusal(
            413,
            "text_too_big",
            f"{beside} bytes beside the images, the limit is {bounds.beside_images}",
        )
    return body, _prepared(bounds, kind, parsed, media, held)


def _prepared(
    bounds: Bounds,
    kind: Kind,
    parsed: Parsed,
    media: Sequence[Picture | Clip],
    held: Sequence[Held],
) -> Prepared:
    units = sum(one.units for one in held)
    decoded = sum(
        medium.decoded_bytes * one.frames for medium, one in zip(media, held, strict=True)
    )
    lowered = [*parsed.lowered, *(word for one in held for word in one.lowered)]
    # Counting tokens encodes no image: only their text is passed on.
    copies = 0 if kind == "count_tokens" else parsed.copies
    return Prepared(
        images=len(media),
        copies=parsed.copies,
        units=units * copies,
        tokens=sum(one.tokens for one in held),
        host_bytes=(decoded + units * bounds.bytes_per_unit) * copies,
        lowered=tuple(dict.fromkeys(lowered)),
    )


def _picture(bounds: Bounds, slot: Slot, fetched: Mapping[str, bytes]) -> Picture:
    most = bounds.limits.bytes_per_image
    if slot.inline:
        return from_base64(slot.source, most)
    if is_remote(slot):
        return from_bytes(fetched[slot.source], most)
    return from_url(slot.source, most)


def _held(bounds: Bounds, parsed: Parsed, slot: Slot, medium: Picture | Clip) -> Held:
    """One image or video within the plan; what holds a video goes into the body itself."""
    if isinstance(medium, Picture):
        return hold_image(bounds, medium.size, slot.asked, carries=slot.carries)
    held, keywords = hold_clip(bounds, medium, parsed.watching)
    parsed.body.update(keywords)
    return held


def _decode(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Refusal(400, "bad_json", "the body is not valid JSON in UTF-8") from None


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        raise Refusal(400, "bad_json", "the body holds what JSON cannot carry on") from None
