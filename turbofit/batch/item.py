"""Items of an input, and lines of an output."""

from __future__ import annotations

import re
import zlib
from typing import Annotated, Any, Final

import msgspec

from turbofit.core.json_types import JsonObject
from turbofit.core.struct import Struct, doc

CHAT: Final = "/v1/chat/completions"
#: What every line of an output begins with.
LINE_START: Final = b'{"id":"batch_req_'
_ID: Final = re.compile(r"batch_req_(\d{1,12})-([0-9a-f]{8})")


class ItemError(Exception):
    """One item cannot be sent, or got no answer: its line says so, and the others go on.

    Args:
        code: a short stable word for programs, e.g. ``image_missing``.
        message: one sentence with the cause.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        #: Names of files may hold bytes that no JSON takes.
        self.message = message.encode(errors="backslashreplace").decode()


class BatchItem(Struct):
    """One item: ``number`` is its line or its place in the input, from 1 on.

    ``digest`` is of what it asks, so that a changed input is noticed. ``body`` is JSON as it stood
    in the input, or an object whose images may be files. ``fault``: it cannot be sent.
    """

    number: int
    digest: int
    custom_id: str | None = None
    url: str = CHAT
    body: msgspec.Raw | JsonObject = msgspec.field(default_factory=dict)
    fault: ItemError | None = None

    @property
    def line_id(self) -> str:
        """The ``id`` of its line."""
        return f"batch_req_{self.number}-{self.digest:08x}"


class BatchResponse(Struct):
    """What the server answered."""

    status_code: int
    request_id: str
    body: Annotated[Any, doc("The server's JSON, as it came.")]


class BatchError(Struct):
    """Why an item failed."""

    code: Annotated[str, doc("A short stable word, e.g. image_missing.")]
    message: str


class BatchLine(Struct):
    """One line of an output, in the form of OpenAI's batches; it failed where ``error`` is set."""

    id: Annotated[str, doc("batch_req_LINE-DIGEST: the item's place in the input.")]
    custom_id: str | None
    response: BatchResponse | None = None
    error: BatchError | None = None

    @property
    def text(self) -> str | None:
        """The answer's text; None where there is none."""
        try:
            assert self.response is not None
            choice = self.response.body["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
        except (AssertionError, LookupError, TypeError):
            return None
        return text if isinstance(text, str) else None


def digest_of(data: bytes, seed: int = 0) -> int:
    """32 bits that are never 0: two contents have the same once in four thousand million."""
    return zlib.crc32(data, seed & 0xFFFFFFFF) or 1


def place_of(identity: str) -> tuple[int, int] | None:
    """Number and digest in a line's ``id``; None where it is none of ours."""
    match = _ID.fullmatch(identity)
    return (int(match[1]), int(match[2], 16)) if match else None
