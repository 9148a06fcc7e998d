"""What a plan must promise so that every item of an input is served: read from the items.

Images are looked at by their headers alone. Text is counted in bytes, since a token has one at
least. Over: a prompt has about a quarter as many tokens, and the longest prompt, the most images
and the worst image are promised together, though different items have them.
"""

from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.batch.images import image_sources, is_remote, local_path
from turbofit.batch.item import ItemError
from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct
from turbofit.gateway.limits.cost import UNSTATED
from turbofit.gateway.limits.reservation import most_tokens
from turbofit.gateway.media.pictures import LARGEST_PIXELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.batch.batch_input import BatchInput
    from turbofit.batch.item import BatchItem
    from turbofit.core.images import AnyImageRule
    from turbofit.core.json_types import JsonObject, Options
    from turbofit.core.model import Model

__all__ = ["BatchWorkload", "workload_of"]

#: Characters of base64 that hold any usual header; of a longer one all are looked at.
_HEADER: Final = 1 << 16
_STEP: Final = 256
_KINDS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_DATA: Final = re.compile(rb'"data:[^"]{0,80};base64,[^"]*"')


class BatchWorkload(Struct):
    """The worst of an input.

    ``image_size`` is None where the server fetches an image: it may be the worst that there is.
    ``context`` is None where an item does not bound its answer.
    """

    images: int = 0
    image_size: tuple[int, int] | None = None
    context: int | None = None
    #: Items whose answers end where the session does.
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
    source: BatchInput, model: Model, tick: Callable[[int], None] = lambda _: None
) -> BatchWorkload:
    """Read all items and look at their images.

    Args:
        source: the input.
        model: whose rule says which image is the worst.
        tick: called now and then, with the number of the item; what it raises ends the reading.
    """
    most = _Most(source, model.image_rule)
    for item in source.items():
        if item.fault is None:
            most.look(item)
        if item.number % _STEP == 0:
            tick(item.number)
    longest = model.text.max_position_embeddings
    context = min(most.context, longest) if most.context and not most.unbounded else None
    return BatchWorkload(
        images=most.images,
        image_size=None if most.elsewhere else most.size,
        context=context,
        unbounded=most.unbounded,
    )


class _Most:
    """The most of each that was seen."""

    def __init__(self, source: BatchInput, rule: AnyImageRule | None) -> None:
        self._base, self._answer, self._rule = source.base, source.max_tokens, rule
        self.images = self.context = self.unbounded = 0
        self.size: tuple[int, int] | None = None
        #: Whether an image is fetched by the server, and nobody here knows its size.
        self.elsewhere = False
        self._units = 0

    def look(self, item: BatchItem) -> None:
        """One item; what cannot be read will fail alone, and counts for nothing here."""
        raw = item.body
        try:
            text = bytes(raw) if isinstance(raw, msgspec.Raw) else msgspec.json.encode(raw)
            body: JsonObject = msgspec.json.decode(text)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return
        urls = [one["url"] for one in image_sources(body)]
        self.images = max(self.images, len(urls))
        tokens = sum(self._image_tokens(url) for url in urls)
        if self._answer and not {"max_tokens", "max_completion_tokens"} & body.keys():
            body["max_tokens"] = self._answer
        text = _DATA.sub(b'""', text)
        whole = most_tokens(_KINDS.get(item.url, ""), body, text, len(text), tokens)
        if whole == UNSTATED:
            self.unbounded += 1
        else:
            self.context = max(self.context, whole)

    def _image_tokens(self, url: str) -> int:
        """Tokens of an image, which is the worst so far where it has the most units."""
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
            self._units, self.size = units, size
        return rule.tokens(*size)


def _size(url: str, base: str) -> tuple[int, int] | None:
    """Width and height of an image that is here, None where its item will fail."""
    from PIL import Image

    try:
        path = local_path(url, base)
    except ItemError:
        return None
    sources: list[Any] = [path]
    if path is None:
        payload = url.partition(",")[2]
        sources = [payload[:_HEADER], payload] if len(payload) > _HEADER else [payload]
    for one in sources:
        try:
            file = one if path is not None else BytesIO(b64decode(one + "=" * (-len(one) % 4)))
            with Image.open(file) as image:
                size = int(image.width), int(image.height)
        except Exception:  # noqa: BLE001 - Pillow's plugins raise whatever they meet
            continue
        return size if size[0] * size[1] <= LARGEST_PIXELS else None
    return None
