"""What a plan must promise so that every item of an input is served: read from the items.

Images are looked at by their headers alone. Text is counted in bytes, since a token has one at
least. Over: a prompt has about a quarter as many tokens, and the longest prompt, the most images
and the worst image are promised together, though different items have them.
"""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.batch.item import ItemError
from turbofit.batch.request_body import image_sources, is_remote, local_path
from turbofit.core.errors import UsageError
from turbofit.gateway.limits.cost import UNSTATED
from turbofit.gateway.limits.reservation import most_tokens
from turbofit.gateway.media.pictures import LARGEST_PIXELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.batch.item import BatchInput, BatchItem
    from turbofit.core.images import AnyImageRule
    from turbofit.core.json_types import JsonObject, Options
    from turbofit.core.model import Model

__all__ = ["BatchWorkload", "workload_of"]

#: Characters of base64 that hold any usual header; of a longer one all are looked at.
_HEADER: Final = 1 << 16
_STEP: Final = 256
_KINDS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_DATA: Final = re.compile(rb'"data:[^"]{0,80};base64,[^"]*"')


@dataclass
class BatchWorkload:
    """The worst of an input.

    ``image_size`` is None where the server fetches an image: it may be the worst that there is.
    ``context`` is None where an item does not bound its answer; ``unbounded`` counts those.
    """

    images: int = 0
    image_size: tuple[int, int] | None = None
    context: int | None = None
    unbounded: int = 0

    @property
    def text(self) -> str:
        """The most of each in one line."""
        size = "" if self.image_size is None else f", {self.image_size[0]}x{self.image_size[1]}"
        images = f"{self.images} image{'s' * (self.images != 1)}{size}"
        tokens = "no bound of tokens" if self.context is None else f"{self.context:,} tokens"
        return f"{images}, {tokens}"

    def keywords(self, request: Options, *, shrink: bool) -> Options:
        """Fields of a plan's request; what a person has given stays."""
        found: Options = {"images": self.images}
        if self.image_size is not None and not shrink:
            found["image_size"] = self.image_size
        if self.context is not None and "session_len" not in request:
            found["context"] = self.context
        return {name: value for name, value in found.items() if name not in request}


def workload_of(
    source: BatchInput, model: Model, tick: Callable[[], None] = lambda: None
) -> BatchWorkload:
    """Read all items and look at their images.

    Args:
        source: the input.
        model: whose rule says which image is the worst.
        tick: called now and then; what it raises ends the reading.
    """
    worst, images = BatchWorkload(), _Images(source.base, model.image_rule)
    longest = 0
    for item in source.items():
        if item.number % _STEP == 0:
            tick()
        body = None if item.fault else _body(item)
        if body is None:  # it will fail alone, and counts for nothing here
            continue
        urls = [image["url"] for image in image_sources(body)]
        worst.images = max(worst.images, len(urls))
        tokens = sum(map(images.tokens, urls))
        if source.max_tokens and not {"max_tokens", "max_completion_tokens"} & body.keys():
            body["max_tokens"] = source.max_tokens
        text = _DATA.sub(b'""', _text(item))
        whole = most_tokens(_KINDS.get(item.url, ""), body, text, len(text), tokens)
        if whole == UNSTATED:
            worst.unbounded += 1
        else:
            longest = max(longest, whole)
    worst.image_size = None if images.elsewhere else images.worst
    if longest and not worst.unbounded:
        worst.context = min(longest, model.text.max_position_embeddings)
    return worst


def _text(item: BatchItem) -> bytes:
    raw = item.body
    return bytes(raw) if isinstance(raw, msgspec.Raw) else msgspec.json.encode(raw)


def _body(item: BatchItem) -> JsonObject | None:
    """What an item asks; None where it cannot be read."""
    try:
        body: JsonObject = msgspec.json.decode(_text(item))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return body


class _Images:
    """The images of an input."""

    def __init__(self, base: str, rule: AnyImageRule | None) -> None:
        self._base, self._rule, self._units = base, rule, 0
        #: Size of the one with the most units.
        self.worst: tuple[int, int] | None = None
        #: Whether an image is fetched by the server, and nobody here knows its size.
        self.elsewhere = False

    def tokens(self, url: str) -> int:
        """Tokens of an image."""
        rule = self._rule
        if rule is None:
            return 0
        if is_remote(url):
            self.elsewhere = True
            return rule.unit_tokens(rule.worst_units())
        size = _size(url, self._base)
        if size is None:
            return 0
        try:
            units = rule.units(*size)
        except UsageError:
            return 0
        if units > self._units:
            self._units, self.worst = units, size
        return rule.tokens(*size)


def _size(url: str, base: str) -> tuple[int, int] | None:
    """Width and height of an image that is here, None where its item will fail."""
    from PIL import Image

    payload = url.partition(",")[2]
    # Of a long one the header alone, and all of it where that does not do.
    parts = [payload[:_HEADER], payload] if len(payload) > _HEADER else [payload]
    try:
        path = local_path(url, base)
    except ItemError:
        return None
    for source in parts if path is None else [path]:
        try:
            file: Any = source
            if path is None:
                file = BytesIO(b64decode(source + "=" * (-len(source) % 4)))
            with Image.open(file) as image:
                size = int(image.width), int(image.height)
        except Exception:  # noqa: BLE001 - Pillow's plugins raise whatever they meet
            continue
        return size if size[0] * size[1] <= LARGEST_PIXELS else None
    return None
