"""Events of a streamed chat completion, as any server of the form sends them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from turbofit.core.json_types import JsonObject

#: Exceptions of decoding bytes that are not JSON.
NO_JSON: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
#: The most bytes of an error's text.
LARGEST_ERROR: Final = 1 << 16
_OTHERS: Final = (b":", b"event:", b"id:", b"retry:")


class StreamError(Exception):
    """A server's bytes are no answer; ``kind`` is the error's name, its text those bytes."""

    def __init__(self, kind: str, example: bytes = b"") -> None:
        super().__init__(example[:LARGEST_ERROR].decode(errors="replace"))
        self.kind = kind


def event_of(line: bytes) -> JsonObject | None:
    """The event in a line of a stream; None for a line without one, empty for ``[DONE]``.

    Raises:
        StreamError: the line is no event with choices, or an error's event.
    """
    if not line or line.startswith(_OTHERS):
        return None
    body = line[5:].strip()
    if line.startswith(b"data:") and body == b"[DONE]":
        return {}
    try:
        event = msgspec.json.decode(body) if line.startswith(b"data:") else None
    except NO_JSON:
        event = None
    if not isinstance(event, dict) or not ("choices" in event or "error" in event):
        raise StreamError("garbage", body)
    if event.get("error") is not None:
        raise StreamError("error event", body)
    return event
