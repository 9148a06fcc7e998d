"""From the bytes of a body to the bytes that an engine is given, and what they will cost it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from turbofit.core.struct import Struct
from turbofit.gateway.bodies import Parsed, read_body
from turbofit.gateway.limits import Held, check_images, check_request, hold_image
from turbofit.gateway.pictures import Picture, from_base64, from_url
from turbofit.gateway.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.gateway.bodies import Slot
    from turbofit.gateway.limits import Bounds
    from turbofit.gateway.routes import Kind

__all__ = ["Prepared", "finish", "remote_urls", "start"]


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
        Refusal: not JSON, not this API's shape, or too many images.
    """
    parsed = read_body(kind, _decode(raw))
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
    bounds: Bounds, kind: Kind, parsed: Parsed, fetched: Mapping[str, Picture] | None = None
) -> tuple[bytes, Prepared]:
    """Hold every image, write it back inline, check the whole and encode it.

    Args:
        bounds: the plan's.
        kind: of route.
        parsed: what `start` gave.
        fetched: the pictures of `remote_urls`.

    Returns:
        The body for the engine, and what it costs.

    Raises:
        Refusal: what no lowering can bring within the plan.
    """
    pictures = [_picture(bounds, slot, fetched or {}) for slot in parsed.slots]
    held = [
        hold_image(bounds, picture.size, slot.asked, carries=slot.carries)
        for slot, picture in zip(parsed.slots, pictures, strict=True)
    ]
    if kind != "count_tokens":
        check_request(bounds, held, n=parsed.copies, max_tokens=parsed.max_tokens)
    for slot, picture, one in zip(parsed.slots, pictures, held, strict=True):
        slot.fill(picture, one.knobs)
    body = _encode(parsed.body)
    beside = len(body) - sum(len(picture.base64) for picture in pictures)
    if beside > bounds.beside_images:
        raise Refusal(
            413,
            "text_too_big",
            f"{beside} bytes beside the images, the limit is {bounds.beside_images}",
        )
    return body, _prepared(bounds, kind, parsed, pictures, held)


def _prepared(
    bounds: Bounds,
    kind: Kind,
    parsed: Parsed,
    pictures: Sequence[Picture],
    held: Sequence[Held],
) -> Prepared:
    units = sum(one.units for one in held)
    decoded = sum(picture.decoded_bytes for picture in pictures)
    lowered = [*parsed.lowered, *(word for one in held for word in one.lowered)]
    # Counting tokens encodes no image: only their text is passed on.
    copies = 0 if kind == "count_tokens" else parsed.copies
    return Prepared(
        images=len(pictures),
        copies=parsed.copies,
        units=units * copies,
        tokens=sum(one.tokens for one in held),
        host_bytes=(decoded + units * bounds.bytes_per_unit) * copies,
        lowered=tuple(dict.fromkeys(lowered)),
    )


def _picture(bounds: Bounds, slot: Slot, fetched: Mapping[str, Picture]) -> Picture:
    most = bounds.limits.bytes_per_image
    if slot.inline:
        return from_base64(slot.source, most)
    if is_remote(slot):
        return fetched[slot.source]
    return from_url(slot.source, most)


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
