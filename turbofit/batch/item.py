"""Items of an input, how one is made of a prompt and images, and lines of an output."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.json_types import JsonObject
from turbofit.core.struct import Struct, doc

__all__ = [
    "CHAT",
    "LINE_START",
    "BatchError",
    "BatchInput",
    "BatchItem",
    "BatchLine",
    "BatchResponse",
    "ItemError",
    "PromptTemplate",
    "chat_body",
    "digest_of",
    "encoded",
    "line_id",
    "place_of",
]  # fmt: skip

CHAT: Final = "/v1/chat/completions"
#: What every line of an output begins with.
LINE_START: Final = b'{"id":"batch_req_'
_PLACEHOLDER: Final = re.compile(r"\{\{(\w+)\}\}|\{([^{}\n\"':,]{1,128})\}")
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


class BatchInput(NamedTuple):
    """An input: ``items`` reads it anew at each call, in the same order.

    Relative paths of images begin in ``base``; ``max_tokens`` is the bound of answers to items that
    state none, None where the server decides.
    """

    base: str
    max_tokens: int | None
    items: Callable[[], Iterator[BatchItem]]


class PromptTemplate:
    """A prompt whose ``{word}`` are replaced; ``{{word}}`` stands for ``{word}`` itself.

    Other braces stay, so that a prompt may hold JSON.

    Args:
        text: the prompt.
        names: the placeholders that there are.

    Raises:
        UsageError: a placeholder that there is not.
    """

    def __init__(self, text: str, names: Iterable[str]) -> None:
        self._text, known = text, tuple(names)
        #: Placeholders that stand in the prompt.
        self.used = {match[2] for match in _PLACEHOLDER.finditer(text) if match[2]}
        if unknown := sorted(self.used - set(known)):
            word = f"{{{unknown[0]}}}"
            listed = ", ".join(f"{{{name}}}" for name in known[:20])
            raise UsageError(
                f"{word} in the prompt is no placeholder here",
                hint=f"there are {listed}; write {{{word}}} for {word} itself",
            )

    def fill(self, values: Mapping[str, str]) -> str:
        """The prompt of one item."""
        return _PLACEHOLDER.sub(
            lambda match: f"{{{match[1]}}}" if match[1] else values[match[2]], self._text
        )


def chat_body(prompt: str, images: list[str]) -> JsonObject:
    """A chat request with images before its prompt."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content = [*pictures, {"type": "text", "text": prompt}] if pictures else prompt
    return {"messages": [{"role": "user", "content": content}]}


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
            found = choice["message"]["content"] if "message" in choice else choice["text"]
        except (AssertionError, LookupError, TypeError):
            return None
        return found if isinstance(found, str) else None


def digest_of(data: bytes) -> int:
    """32 bits that are never 0: two contents have the same once in four thousand million."""
    return zlib.crc32(data) or 1


def line_id(item: BatchItem) -> str:
    """The ``id`` of an item's line."""
    return f"batch_req_{item.number}-{item.digest:08x}"


def place_of(identity: str) -> tuple[int, int] | None:
    """Number and digest in a line's ``id``; None where it is none of ours."""
    found = _ID.fullmatch(identity)
    return (int(found[1]), int(found[2], 16)) if found else None


def encoded(line: BatchLine) -> bytes:
    """The line with its end."""
    return msgspec.json.encode(line) + b"\n"
