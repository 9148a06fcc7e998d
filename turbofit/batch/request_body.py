"""The body that is sent for an item: whole, with its model, without a stream, its images inline."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import msgspec

from turbofit.batch.item import ItemError
from turbofit.core.errors import UsageError
from turbofit.core.images import AnyImageRule
from turbofit.core.struct import Struct
from turbofit.core.units import MIB, format_bytes
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.pictures import Picture, from_bytes, from_url, resized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.batch.item import BatchItem
    from turbofit.core.json_types import JsonObject

#: What a plan allows too (`tuner/explain/plan_document.py`).
_BYTES: Final = 32 * MIB
#: The largest file that is read to be made smaller.
LARGEST_FILE: Final = 512 * MIB


class ImageLimits(Struct):
    """What an image may be: ``units`` of the rule at most, where there is a plan."""

    bytes: int = _BYTES
    rule: AnyImageRule | None = None
    units: int | None = None
    limit: int | None = None
    shrink: bool = False

    @property
    def bytes_read(self) -> int:
        """Bytes of the largest file that is read."""
        return LARGEST_FILE if self.shrink else self.bytes


def request_body(
    item: BatchItem,
    model: str,
    *,
    replace: bool,
    base: str,
    limits: ImageLimits,
    max_tokens: int | None,
) -> bytes:
    """The body that is sent for an item.

    Args:
        item: which may have files that are read.
        model: the name to ask for.
        replace: it replaces the item's model too; else it is for items that name none.
        base: where paths of images begin.
        limits: of images.
        max_tokens: of an answer, for items that state none.

    Raises:
        ItemError: the item cannot be sent.
    """
    try:
        body = decoded_body(item)
        if body.get("stream"):
            raise ItemError("bad_stream", "a batch has no streams: leave stream out")
        if replace or body.get("model") is None:
            body["model"] = model
        bound_answer(body, max_tokens)
        inlined(body, base, limits)
        return msgspec.json.encode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as exc:
        raise ItemError("bad_line", f"the body cannot be sent: {exc}") from None


def decoded_body(item: BatchItem) -> JsonObject:
    """The body of an item, which may be changed.

    Raises:
        MsgspecError: it is no JSON, and so do `RecursionError` and `UnicodeError`.
    """
    raw = item.body
    text = raw if isinstance(raw, msgspec.Raw) else msgspec.json.encode(raw)
    body: JsonObject = msgspec.json.decode(text)
    return body


def bound_answer(body: JsonObject, tokens: int | None) -> None:
    """Have the answer bounded by so many tokens, where the body states no bound."""
    if tokens and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = tokens


def image_sources(body: JsonObject) -> Iterator[JsonObject]:
    """Each object of a chat request whose ``url`` is an image."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "image_url":
                continue
            source = part.get("image_url")
            if isinstance(source, str):
                source = part["image_url"] = {"url": source}
            if isinstance(source, dict) and isinstance(source.get("url"), str):
                yield source


def is_remote(url: str) -> bool:
    """Whether the server is to fetch it."""
    return url[:8].lower().startswith(("http://", "https://"))


def local_path(url: str, base: str) -> str | None:
    """The file that a URL of an item means; None for what stands in the item itself.

    Raises:
        ItemError: it is no URL.
    """
    if url[:5].lower() == "data:":
        return None
    if url[:5].lower() == "file:":
        try:
            return unquote(urlsplit(url).path)
        except ValueError as exc:
            raise ItemError("image_missing", f"{url} is no URL of a file: {exc}") from None
    return os.path.join(base, url)


def inlined(body: JsonObject, base: str, limits: ImageLimits) -> None:
    """Replace the images of a body by what is sent; addresses stay for the server.

    Raises:
        ItemError: one is missing, broken, too large, or changes while it is read.
    """
    for number, source in enumerate(image_sources(body), 1):
        url: str = source["url"]
        if is_remote(url):
            continue
        path = local_path(url, base)
        what = f"image {number}" if path is None else path
        try:
            if path is None:
                picture = from_url(url, limits.bytes_read)
            else:
                picture = from_bytes(_file_bytes(path, limits.bytes_read), limits.bytes_read)
            source["url"] = _within(picture, limits, what).inline
        except Refusal as exc:
            raise ItemError(exc.reason, f"{what}: {exc.message}") from None


def _file_bytes(path: str, most: int) -> bytes:
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ItemError("image_missing", f"{path} is no file that is there")
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            if before.st_size > most:
                sizes = f"{format_bytes(before.st_size)}, the limit is {format_bytes(most)}"
                raise ItemError("image_too_big", f"{path} has {sizes}")
            data = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except OSError as exc:
        raise ItemError("image_unreadable", f"{path}: {exc.strerror or exc}") from None
    if (len(data), before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ItemError("image_changed", f"{path} changed while it was read")
    return data


def _within(picture: Picture, limits: ImageLimits, what: str) -> Picture:
    """The picture, or a smaller one where that is asked for.

    What has too many units alone is left to the gateway, which lowers it by the same rule.
    """
    rule, size = limits.rule, picture.size
    if rule is not None and limits.units is not None and not limits.shrink:
        try:
            units = rule.units(*size)
        except UsageError as exc:
            raise ItemError("bad_image_size", exc.message) from None
        if units > limits.units:
            raise ItemError(
                "image_over_limit",
                f"{what} of {size[0]}x{size[1]} takes {units} {rule.units_name}, the plan's limit "
                f"is {limits.units}; --shrink makes it smaller",
            )
    if picture.bytes <= limits.bytes:
        return picture
    smaller = rule and rule.size_within(size, limits.limit or rule.checkpoint_limit)
    found = resized(picture, smaller or size)
    if found.bytes > limits.bytes:
        raise ItemError(
            "image_too_big",
            f"{what} of {size[0]}x{size[1]} has {format_bytes(found.bytes)} when it is made smaller"
            f", the limit is {format_bytes(limits.bytes)}",
        )
    return found
