"""A file of requests, one JSON object a line, in the form of OpenAI's batches."""

from __future__ import annotations

from codecs import BOM_UTF8
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.batch.item import CHAT, BatchItem, ItemError, digest_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["JsonlSource"]

#: Bytes of one line: far above the largest body that the gateway takes.
LONGEST_LINE: Final = 1 << 28


class _Line(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw
    method: str = "POST"
    url: str = CHAT


class _Named(msgspec.Struct):
    """What is left of a line that is wrong otherwise."""

    custom_id: str


class JsonlSource:
    """Each line that is not empty is an item, and its number is the line's.

    Args:
        path: the file.
        max_tokens: of answers to items that state none; None leaves that to the server.
    """

    def __init__(self, path: Path, max_tokens: int | None) -> None:
        self._path = path
        self.base, self.max_tokens = str(path.parent), max_tokens

    def items(self) -> Iterator[BatchItem]:
        """See `BatchInput`."""
        for number, raw in enumerate(self._lines(), 1):
            if raw:
                yield _item(number, raw)

    def digests(self) -> Iterator[int]:
        """See `BatchInput`."""
        for raw in self._lines():
            yield digest_of(raw) if raw else 0

    def _lines(self) -> Iterator[bytes]:
        """Each line without its end; of one that is too long its beginning."""
        with self._path.open("rb", buffering=1 << 20) as file:
            first = True
            while raw := file.readline(LONGEST_LINE + 1):
                if len(raw) > LONGEST_LINE and not raw.endswith(b"\n"):
                    while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                        pass
                if first:
                    raw, first = raw.removeprefix(BOM_UTF8), False
                yield raw.strip()


def _item(number: int, raw: bytes) -> BatchItem:
    digest = digest_of(raw)
    if len(raw) > LONGEST_LINE:
        fault = ItemError("bad_line", f"the line has more than {LONGEST_LINE} bytes")
        return BatchItem(number=number, digest=digest, fault=fault)
    try:
        line = msgspec.json.decode(raw, type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        fault = ItemError("bad_line", f"line {number} is no request of a batch: {exc}")
        return BatchItem(number=number, digest=digest, custom_id=_name(raw), fault=fault)
    return BatchItem(
        number=number, digest=digest, custom_id=line.custom_id, url=line.url, body=line.body,
        fault=_fault(line),
    )  # fmt: skip


def _name(raw: bytes) -> str | None:
    try:
        return msgspec.json.decode(raw, type=_Named).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _fault(line: _Line) -> ItemError | None:
    if line.method != "POST":
        return ItemError("bad_method", f"method {line.method!r} is not POST")
    if not line.url.startswith("/v1/"):
        return ItemError("bad_url", f"url {line.url!r} does not begin with /v1/")
    if not bytes(line.body).startswith(b"{"):
        return ItemError("bad_line", "body is no JSON object")
    return None
