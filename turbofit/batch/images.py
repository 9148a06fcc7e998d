"""Images of a request, read from where they are, checked, and put inline."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from turbofit.batch.item import ItemError
from turbofit.core.errors import UsageError
from turbofit.core.images import AnyImageRule
from turbofit.core.struct import Struct
from turbofit.core.units import MIB, format_bytes
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.pictures import Picture, from_bytes, from_url
from turbofit.gateway.media.resize import resized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.json_types import JsonObject

__all__ = ["ImageLimits", "image_sources", "inlined", "is_remote", "local_path"]

#: What a plan allows too (`tuner/explain/plan_document.py`).
_BYTES: Final = 32 * MIB
#: The largest file that is read to be made smaller.
_LARGEST_FILE: Final = 512 * MIB


class ImageLimits(Struct):
    """What an image may be: ``units`` of the rule at most, where there is a plan."""

    bytes: int = _BYTES
    rule: AnyImageRule | None = None
    units: int | None = None
    limit: int | None = None
    shrink: bool = False


def image_sources(body: JsonObject) -> Iterator[JsonObject]:
    """Each object of a chat request whose ``url`` is an image."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for one in content if isinstance(content, list) else ():
            if not isinstance(one, dict) or one.get("type") != "image_url":
                continue
            source = one.get("image_url")
            if isinstance(source, str):
                source = one["image_url"] = {"url": source}
            if isinstance(source, dict) and isinstance(source.get("url"), str):
                yield source


def inlined(body: JsonObject, base: str, limits: ImageLimits) -> None:
    """Replace the images of a body by what is sent; addresses stay for the server.

    Raises:
        ItemError: one is missing, broken, too large, or changes while it is read.
    """
    for number, source in enumerate(image_sources(body), 1):
        url: str = source["url"]
        if not is_remote(url):
            source["url"] = _held(url, base, limits, number).inline


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


def _held(url: str, base: str, limits: ImageLimits, number: int) -> Picture:
    path = local_path(url, base)
    what = f"image {number}" if path is None else path
    try:
        picture = from_url(url, _most(limits)) if path is None else _from_file(path, limits)
        return _within(picture, limits, what)
    except Refusal as exc:
        raise ItemError(exc.reason, f"{what}: {exc.message}") from None


def _most(limits: ImageLimits) -> int:
    return _LARGEST_FILE if limits.shrink else limits.bytes


def _from_file(path: str, limits: ImageLimits) -> Picture:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise ItemError("image_missing", f"{path} is no file")
            if before.st_size > _most(limits):
                raise ItemError(
                    "image_too_big",
                    f"{path} has {format_bytes(before.st_size)}, the limit is "
                    f"{format_bytes(_most(limits))}",
                )
            data = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise ItemError("image_missing", f"{path} is not there") from None
    except OSError as exc:
        raise ItemError("image_unreadable", f"{path}: {exc.strerror or exc}") from None
    if len(data) != before.st_size or _state(before) != _state(after):
        raise ItemError("image_changed", f"{path} changed while it was read")
    return from_bytes(data, _most(limits))


def _without_waiting(path: str, flags: int) -> int:
    """A pipe opens at once, and is refused."""
    return os.open(path, flags | os.O_NONBLOCK)


def _state(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_size, seen.st_mtime_ns


def _within(picture: Picture, limits: ImageLimits, what: str) -> Picture:
    """The picture, or a smaller one where that is asked for.

    What has too many units alone is left to the gateway, which lowers it by the same rule.
    """
    rule, size = limits.rule, picture.size
    if rule is not None and limits.units is not None and not limits.shrink:
        units = _units(rule, size)
        if units > limits.units:
            raise ItemError(
                "image_over_limit",
                f"{what} of {size[0]}x{size[1]} takes {units} {rule.units_name}, the plan's limit "
                f"is {limits.units}; --shrink makes it smaller",
            )
    if picture.bytes <= limits.bytes:
        return picture
    smaller: Any = None
    if rule is not None:
        smaller = rule.size_within(size, limits.limit or rule.checkpoint_limit)
    found = resized(picture, smaller or size)
    if found.bytes > limits.bytes:
        raise ItemError(
            "image_too_big",
            f"{what} of {size[0]}x{size[1]} has {format_bytes(found.bytes)} when it is made smaller"
            f", the limit is {format_bytes(limits.bytes)}",
        )
    return found


def _units(rule: AnyImageRule, size: tuple[int, int]) -> int:
    try:
        return rule.units(*size)
    except UsageError as exc:
        raise ItemError("bad_image_size", exc.message) from None
