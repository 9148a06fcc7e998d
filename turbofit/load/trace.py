"""Reads a trace: for each request a JSON line or a CSV row with its arrival and its sizes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct, decode, doc, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Bytes of English text in about one token of the served models.
BYTES_A_TOKEN: Final = 4.0
_LARGEST: Final = 1 << 30
_LONGEST_TEXT: Final = 1 << 24
_MOST_IMAGES: Final = 1024
_LARGEST_SIDE: Final = 1 << 16
#: The size of an image for which a CSV gives no size.
_USUAL_IMAGE: Final = [1920, 1080]
_CSV: Final = (
    "write arrival, text tokens, images and answer tokens: 0.5,200,1,128 or 0.5,200,640x480,128"
)

Tokens = Annotated[int, msgspec.Meta(ge=0, le=_LONGEST_TEXT)]
Side = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST_SIDE)]


class TracedRequest(Struct):
    """A request of a trace, and its line; ``prompt_tokens`` or ``prompt_bytes`` is enough."""

    at: Annotated[float, msgspec.Meta(ge=0), doc("Seconds after the first request.")]
    output_tokens: Annotated[Tokens, doc("Tokens of the answer.")]
    prompt_tokens: Annotated[Tokens | None, doc("Tokens of text.")] = None
    prompt_bytes: Annotated[Tokens | None, doc("Bytes of text.")] = None
    images: Annotated[tuple[tuple[Side, Side], ...], doc("Width and height of each.")] = ()

    @property
    def text_tokens(self) -> int:
        """Tokens of text; estimated from bytes by English text."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return round((self.prompt_bytes or 0) / BYTES_A_TOKEN)


def read_trace(path: str) -> tuple[TracedRequest, ...]:
    """The requests of a file in the order of their arrival, the first one at 0 seconds.

    Raises:
        UsageError: the file cannot be read, is no table of requests, or has none.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LARGEST)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="record one with turbofit serve MODEL --record-trace FILE",
        ) from None
    if path.lower().endswith(".csv"):
        try:
            requests = list(_of_table(data, path))
        except csv.Error as exc:
            raise UsageError(f"{path} is no CSV of requests: {exc}", hint=_CSV) from None
    else:
        lines = ((number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip())
        requests = [decode(line, TracedRequest, what=f"line {n} of {path}") for n, line in lines]
    for number, request in enumerate(requests, 1):
        if len(request.images) > _MOST_IMAGES:
            raise UsageError(
                f"request {number} of {path} has {len(request.images)} images",
                hint=f"at most {_MOST_IMAGES} are sent in a request",
            )
    if not requests:
        raise UsageError(f"{path} holds no request", hint="each line is one: see docs/bench.md")
    requests.sort(key=lambda request: request.at)
    first = requests[0].at
    return tuple(msgspec.structs.replace(request, at=request.at - first) for request in requests)


def _of_table(data: bytes, path: str) -> Iterator[TracedRequest]:
    """The requests of a CSV's rows: arrival, text tokens, images, answer tokens.

    A first row with names is skipped. Images are a number, or sizes like ``640x480``, with spaces
    between.
    """
    for number, row in enumerate(csv.reader(data.decode("utf-8-sig", "replace").splitlines()), 1):
        cells = [cell.strip() for cell in row]
        if not cells or (number == 1 and cells[0][:1].isalpha()):
            continue
        where = f"line {number} of {path}"
        try:
            at, prompt, images, output = cells
            sizes = [[int(side) for side in size.split("x")] for size in images.lower().split()]
            if images.isdigit():
                sizes = [_USUAL_IMAGE] * min(int(images), _MOST_IMAGES + 1)
            given = {"at": float(at), "prompt_tokens": int(prompt), "output_tokens": int(output)}
        except ValueError:
            raise UsageError(f"{where} is no request: {','.join(row)[:80]}", hint=_CSV) from None
        try:
            yield decode(to_json(given | {"images": sizes}), TracedRequest, what=where)
        except UsageError as exc:
            raise UsageError(exc.message, hint=_CSV) from None
