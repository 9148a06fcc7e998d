"""An input's items, and what of them has its line: lines of JSONL, rows of a table, or images."""

from __future__ import annotations

import os
from array import array
from codecs import BOM_UTF8
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from turbofit.batch.item import (
    CHAT,
    BatchInput,
    BatchItem,
    ItemError,
    digest_of,
)
from turbofit.batch.table import open_table
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from turbofit.batch.batch_spec import BatchSpec

__all__ = ["SeenNames", "Survey", "open_input", "pending"]

#: Bytes of one line: far above the largest body that the gateway takes.
LONGEST_LINE: Final = 1 << 28

#: Between two looks whether to stop, in items.
_STEP: Final = 1 << 12
_LEAST_BITS: Final = 10


def open_input(path: Path, spec: BatchSpec) -> BatchInput:
    """The input of this path.

    Raises:
        UsageError: it is not there, cannot be read, or the options are for another kind.
        PackageError: a Parquet file without pyarrow.
    """
    # `Path.exists` raises for a folder of others and for a name that is too long, these do not.
    is_folder = os.path.isdir(path)
    if os.path.exists(path) and not is_folder and not os.path.isfile(path):
        raise UsageError(
            f"{path} is no file that can be read twice", hint="write it into a file first"
        )
    try:
        if is_folder:
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="name a JSONL, CSV or Parquet file, or a folder of images",
        ) from None
    if is_folder:
        _refuse(spec, "image_column", "a folder has no columns")
    if is_folder or path.suffix.lower() in (".csv", ".parquet"):
        return open_table(path, _prompt(spec), spec.image_column, spec.max_tokens)
    for name in ("prompt", "prompt_file", "image_column"):
        _refuse(spec, name, "a JSONL file has whole requests")
    return BatchInput(str(path.parent), spec.max_tokens, partial(_jsonl_items, path))


def _refuse(spec: BatchSpec, name: str, why: str) -> None:
    if getattr(spec, name):
        option = f"--{name.replace('_', '-')}"
        raise UsageError(f"{option} does not fit this input: {why}", hint=f"leave {option} out")


def _prompt(spec: BatchSpec) -> str | None:
    if spec.prompt_file is None:
        return spec.prompt
    try:
        return Path(spec.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(
            f"{spec.prompt_file} cannot be read: {getattr(exc, 'strerror', None) or exc}",
            hint="name a text file in UTF-8 with the prompt",
        ) from None


class _Named(msgspec.Struct):
    """What is read of a line that is wrong otherwise."""

    custom_id: str


class _Line(_Named):
    """A request in the form of OpenAI's batches."""

    body: msgspec.Raw
    method: str = "POST"
    url: str = CHAT


def _jsonl_items(path: Path) -> Iterator[BatchItem]:
    """Each line that is not empty is an item, and its number is the line's."""
    with path.open("rb", buffering=1 << 20) as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            rest = raw if len(raw) > LONGEST_LINE else b"\n"
            while rest and not rest.endswith(b"\n"):  # of a line that is too long
                rest = file.readline(1 << 20)
            if number == 1:
                raw = raw.removeprefix(BOM_UTF8)
            if raw := raw.strip():
                yield _item(number, raw)


def _item(number: int, raw: bytes) -> BatchItem:
    digest = digest_of(raw)
    if len(raw) > LONGEST_LINE:
        fault = ItemError("bad_line", f"the line has more than {LONGEST_LINE} bytes")
        return BatchItem(number=number, digest=digest, fault=fault)
    try:
        line = msgspec.json.decode(raw, type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        fault = ItemError("bad_line", f"line {number} is no request of a batch: {exc}")
        try:
            name = msgspec.json.decode(raw, type=_Named).custom_id
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            name = None
        return BatchItem(number=number, digest=digest, custom_id=name, fault=fault)
    why = None
    if line.method != "POST":
        why = ItemError("bad_method", f"method {line.method!r} is not POST")
    elif not line.url.startswith("/v1/"):
        why = ItemError("bad_url", f"url {line.url!r} does not begin with /v1/")
    elif not bytes(line.body).startswith(b"{"):
        why = ItemError("bad_line", "body is no JSON object")
    return BatchItem(
        number=number, digest=digest, custom_id=line.custom_id, url=line.url, body=line.body,
        fault=why,
    )  # fmt: skip


class Survey:
    """How many items there are, a digest of each and whether it has its line: 4 bytes and a bit.

    Args:
        items: all of the input.
        tick: called from time to time; what it raises ends the reading.
    """

    def __init__(self, items: Iterable[BatchItem], tick: Callable[[], None] = lambda: None) -> None:
        #: By the item's number; 0 where there is none, as for an empty line.
        self._digests = array("I", [0])
        self.total = 0
        for item in items:
            self._digests.extend([0] * (item.number - len(self._digests)))
            self._digests.append(item.digest)
            self.total += 1
            if self.total % _STEP == 0:
                tick()
        self._done = bytearray(len(self._digests) // 8 + 1)

    def holds(self, number: int, digest: int) -> bool:
        """Whether the input has this item."""
        return 0 < number < len(self._digests) and self._digests[number] == digest

    def done(self, number: int) -> bool:
        """Whether it has its line."""
        return bool(self._done[number >> 3] >> (number & 7) & 1)

    def mark(self, number: int) -> bool:
        """It has its line; false where it had one before."""
        if self.done(number):
            return False
        self._done[number >> 3] |= 1 << (number & 7)
        return True

    def check_order(self) -> None:
        """Whether what is done is the beginning of the input.

        Raises:
            UsageError: an item is done, and one before it is not.
        """
        missing = 0
        for number, digest in enumerate(self._digests):
            if digest and not self.done(number):
                missing = missing or number
            elif digest and missing:
                raise UsageError(
                    f"item {number} has its line and item {missing} has none: the output is not in "
                    "order",
                    hint="leave --in-order out, or name another output",
                )


class SeenNames:
    """An open hash table of 64-bit digests, a third to two thirds of which are taken at the end.

    It takes 12 to 24 bytes a name, at once. Over: in a million names, two that differ are taken for
    one with a probability of 3e-8.

    Args:
        names: how many there are at most.
    """

    def __init__(self, names: int) -> None:
        self._last = (1 << max(_LEAST_BITS, (names + names // 2).bit_length())) - 1
        self._slots = array("Q", bytes(8)) * (self._last + 1)

    def add(self, name: str) -> bool:
        """Whether this name is new."""
        data = name.encode(errors="surrogatepass")
        digest = int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1
        at = digest & self._last
        while self._slots[at] and self._slots[at] != digest:
            at = (at + 1) & self._last
        new = not self._slots[at]
        self._slots[at] = digest
        return new


def pending(
    items: Iterable[BatchItem], survey: Survey, tick: Callable[[], None] = lambda: None
) -> Iterator[BatchItem]:
    """Items that have no line yet.

    Args:
        items: all of the input, anew.
        survey: of the first reading.
        tick: as of `Survey`.

    Raises:
        UsageError: the input is not what it was when it was read first.
    """
    seen, count = SeenNames(survey.total), 0
    for item in items:
        count += 1
        if not survey.holds(item.number, item.digest):
            raise _changed(f"at item {item.number}")
        if item.custom_id is not None and not seen.add(item.custom_id) and item.fault is None:
            fault = ItemError("duplicate_custom_id", "an item before this one has the same name")
            item = replace(item, fault=fault)  # noqa: PLW2901 - the same item with its fault
        if not survey.done(item.number):
            yield item
        elif count % _STEP == 0:
            tick()
    if count != survey.total:
        raise _changed(f"it had {survey.total:,} items and has {count:,}")


def _changed(how: str) -> UsageError:
    return UsageError(
        f"the input has changed while it was read, {how}",
        hint="give the same command again once nobody writes it",
    )
