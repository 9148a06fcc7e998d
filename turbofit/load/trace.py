"""A trace: a JSON line, or a row of a CSV, for each request; arrival and sizes, and no text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct, decode, doc

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TracedRequest", "read_trace"]

#: Bytes of English text that are about one token of the models that are served.
BYTES_A_TOKEN: Final = 4.0
_LARGEST: Final = 1 << 30
_LONGEST_TEXT: Final = 1 << 24
_MOST_IMAGES: Final = 1024
_LARGEST_SIDE: Final = 1 << 16
#: What stands for an image of which a CSV says no size.
_USUAL_IMAGE: Final = b"1920,1080"

Tokens = Annotated[int, msgspec.Meta(ge=0, le=_LONGEST_TEXT)]
Side = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST_SIDE)]


class TracedRequest(Struct):
    """One line. Of ``prompt_tokens`` and ``prompt_bytes`` one is enough."""

    at: Annotated[float, msgspec.Meta(ge=0), doc("Seconds after the first request.")]
    output_tokens: Annotated[Tokens, doc("Tokens of the answer.")]
    prompt_tokens: Annotated[Tokens | None, doc("Tokens of text.")] = None
    prompt_bytes: Annotated[Tokens | None, doc("Bytes of text.")] = None
    images: Annotated[tuple[tuple[Side, Side], ...], doc("Width and height of each.")] = ()

    @property
    def text_tokens(self) -> int:
        """Tokens of text; from bytes about, as English has them."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return round((self.prompt_bytes or 0) / BYTES_A_TOKEN)


def read_trace(path: str) -> tuple[TracedRequest, ...]:
    """The requests of a file in the order of their arrival, the first of them at 0.

    Raises:
        UsageError: it cannot be read, a line is none, or there is none.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LARGEST)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="record one with turbofit serve MODEL --record-trace FILE",
        ) from None
    lines = [(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    if path.lower().endswith(".csv"):
        lines = [
            (number, _of_row(line)) for place, (number, line) in enumerate(lines)
            if place or line.strip()[:1].isdigit()
        ]  # fmt: skip
    found = [decode(line, TracedRequest, what=f"line {number} of {path}") for number, line in lines]
    for number, one in enumerate(found, 1):
        if len(one.images) > _MOST_IMAGES:
            raise UsageError(
                f"request {number} of {path} has {len(one.images)} images",
                hint=f"at most {_MOST_IMAGES} are sent in a request",
            )
    if not found:
        raise UsageError(f"{path} holds no request", hint="each line is one: see docs/bench.md")
    return _from_zero(sorted(found, key=lambda one: one.at))


def _of_row(row: bytes) -> bytes:
    """A row of a CSV (arrival, text tokens, images, answer tokens) as the line that it stands for.

    Images are their number, or ``640x480`` of each with spaces between. A cell that is no number
    makes a line that is none.
    """
    at, prompt, images, output = (cell.strip() for cell in (*row.split(b","), b"", b"", b"")[:4])
    sizes = images.replace(b"x", b",").split()
    if images.isdigit():
        sizes = [_USUAL_IMAGE] * min(int(images[:5]), _MOST_IMAGES + 1)
    listed = b",".join(b"[%b]" % size for size in sizes)
    cells = (at, prompt, listed, output)
    return b'{"at":%b,"prompt_tokens":%b,"images":[%b],"output_tokens":%b}' % cells


def _from_zero(found: Sequence[TracedRequest]) -> tuple[TracedRequest, ...]:
    first = found[0].at
    return tuple(msgspec.structs.replace(one, at=one.at - first) for one in found)
