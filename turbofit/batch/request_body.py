"""The body that is sent for an item: whole, with its model, without a stream, its images inline."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import msgspec

from turbofit.batch.images import ImageLimits, inlined
from turbofit.batch.item import ItemError

if TYPE_CHECKING:
    from turbofit.batch.item import BatchItem
    from turbofit.core.json_types import JsonObject

__all__ = ["BodyWriter"]


class _Peek(msgspec.Struct):
    """The fields that decide whether a body is sent unchanged."""

    model: Any = None
    stream: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None


class BodyWriter:
    """Writes bodies for one server.

    Args:
        model: the name to ask for.
        replace: it replaces an item's model too; else it is for items that name none.
        base: where paths of images begin.
        limits: of images.
        max_tokens: of an answer, for items that state none.
    """

    def __init__(
        self, model: str, *, replace: bool, base: str, limits: ImageLimits, max_tokens: int | None
    ) -> None:
        self._model, self._replace, self._base = model, replace, base
        self._limits, self._max_tokens = limits, max_tokens

    def body(self, item: BatchItem) -> bytes:
        """The body of an item. It may read files.

        Raises:
            ItemError: the item cannot be sent.
        """
        try:
            raw = item.body
            if isinstance(raw, msgspec.Raw):
                changes = self._changes(msgspec.json.decode(raw, type=_Peek))
                if not changes and b'"image_url"' not in bytes(raw):
                    return bytes(raw)
                body: JsonObject = msgspec.json.decode(raw)
            else:
                body = deepcopy(raw)  # images are replaced in it: the item stays small
                changes = self._changes(_Peek())
            inlined(body, self._base, self._limits)
            return msgspec.json.encode({**body, **changes})
        except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as exc:
            raise ItemError("bad_line", f"the body cannot be sent: {exc}") from None

    def _changes(self, peek: _Peek) -> JsonObject:
        if peek.stream:
            raise ItemError("bad_stream", "a batch has no streams: leave stream out")
        changes: JsonObject = {}
        if self._replace or peek.model is None:
            changes["model"] = self._model
        if self._max_tokens and peek.max_tokens is None and peek.max_completion_tokens is None:
            changes["max_tokens"] = self._max_tokens
        return changes
