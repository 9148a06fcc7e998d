"""Items, their lines, and the output file, which shows what is answered already.

The output file is the only state. The kernel gets each line in one piece before its item counts, so
a line outlives the process; once a second all lines are synced to the disk: a power cut loses the
last second, whose items are sent again. A kernel lock on the output ends with the process.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import zlib
from array import array
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.json_types import JsonObject
from turbofit.core.process.files import open_beside, sync_folder
from turbofit.core.struct import Struct, doc

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


CHAT: Final = "/v1/chat/completions"
#: The beginning of every line of an output.
LINE_START: Final = b'{"id":"batch_req_'
_ID: Final = re.compile(r"batch_req_(\d{1,12})-([0-9a-f]{8})")


class ItemError(Exception):
    """An item cannot be sent, or got no answer: its line says so, and the other items go on.

    ``code`` is a short stable word for programs, e.g. ``image_missing``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        #: Names of files may contain bytes that JSON does not accept.
        self.message = message.encode(errors="backslashreplace").decode()


class BatchItem(Struct):
    """One item: ``number`` is its line or its place in the input, from 1.

    ``digest`` is of its content, so that a changed input is noticed. ``body`` is the input's JSON,
    or an object whose images may be files. ``fault``: why it cannot be sent.
    """

    number: int
    digest: int
    custom_id: str | None = None
    url: str = CHAT
    body: msgspec.Raw | JsonObject = msgspec.field(default_factory=dict)
    fault: ItemError | None = None

    @property
    def line_id(self) -> str:
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
        """The answer's text; None without an answer or without text."""
        try:
            assert self.response is not None
            choice = self.response.body["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
        except (AssertionError, LookupError, TypeError):
            return None
        return text if isinstance(text, str) else None


def digest_of(data: bytes, seed: int = 0) -> int:
    """A 32-bit digest that is never 0; two contents share one in 4,000 million cases."""
    return zlib.crc32(data, seed & 0xFFFFFFFF) or 1


def place_of(identity: str) -> tuple[int, int] | None:
    """The number and the digest in a line's ``id``; None if it is not an id of this batch form."""
    match = _ID.fullmatch(identity)
    return (int(match[1]), int(match[2], 16)) if match else None


_NUL: Final = b"\0"


class Survey:
    """The number of items, and which of them have a line, in 5 bytes an item.

    While it is read it also holds a hash of 64 bits of each name, some 90 bytes: among a million
    names, two different ones count as equal with a probability of 3e-8.
    """

    def __init__(self, items: Iterable[BatchItem]) -> None:
        #: Digests by the item's number; 0 if there is no item, as for an empty line.
        self._digests = array("I", [0])
        self.total = 0
        #: Numbers of items with the name of an earlier item.
        self._doubled: set[int] = set()
        names: set[int] = set()
        for item in items:
            self._digests.extend([0] * (item.number - len(self._digests)))
            self._digests.append(item.digest)
            self.total += 1
            if (name := item.custom_id) is not None:
                if hash(name) in names:
                    self._doubled.add(item.number)
                names.add(hash(name))
        #: For each item's number, whether it has a line.
        self.done = bytearray(len(self._digests))

    def holds(self, number: int, digest: int) -> bool:
        return 0 < number < len(self._digests) and self._digests[number] == digest

    def pending(self, items: Iterable[BatchItem]) -> Iterator[BatchItem]:
        """The items without a line, read from the input again; a `UsageError` if it has changed."""
        count = 0
        for item in items:
            count += 1
            if not self.holds(item.number, item.digest):
                raise _changed(f"at item {item.number}")
            if self.done[item.number]:
                continue
            if item.number in self._doubled and item.fault is None:
                words = "an item before this one has the same name"
                item = replace(item, fault=ItemError("duplicate_custom_id", words))  # noqa: PLW2901
            yield item
        if count != self.total:
            raise _changed(f"it had {self.total:,} items and has {count:,}")


def _changed(how: str) -> UsageError:
    return UsageError(
        f"the input has changed while it was read, {how}",
        hint="give the same command again once nobody writes it",
    )


class _Kept(msgspec.Struct):
    """The parts that are read of a line in the output."""

    id: str
    error: Any = None


class OutputFile:
    """An output file, opened and locked; a context manager.

    Raises:
        UsageError: it cannot be written, or another batch is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open_locked(path)
        #: Bytes of whole lines; None until `resume` has checked that they are a batch's.
        self._size: int | None = None
        self._unsynced = False
        self.answered = self.failed = 0

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def lines(self) -> int:
        """The number of items that have a line."""
        return self.answered + self.failed

    def resume(self, survey: Survey, *, retry_failed: bool) -> None:
        """Mark in the survey the items that have a line, and cut off an incomplete last line.

        ``retry_failed`` removes the lines of failed items, so that these are sent again.

        Raises:
            UsageError: a line belongs to another input, or to no batch.
        """
        size = 0
        with _disk_errors(self.path):
            with _new_file(self.path.resolve()) if retry_failed else nullcontext() as copy:
                for number, line in enumerate(self._whole_lines(), 1):
                    place, failed = self._checked(number, line, survey)
                    if failed and retry_failed:
                        continue
                    if survey.done[place]:
                        raise UsageError(
                            f"line {number} of {self.path} is the second of its item",
                            hint="take one of the two out, or name another output",
                        )
                    survey.done[place] = True
                    size = size + len(line) if copy is None else _written(copy, line, size)
                    self._count(failed=failed)
            if copy is not None:
                os.close(self._fd)
                self._fd = copy
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
            sync_folder(self.path.parent)
        self._size = size

    def append(self, line: bytes, *, failed: bool) -> None:
        """Append a line, whole or not at all; call `resume` first."""
        assert self._size is not None
        with _disk_errors(self.path):
            self._size = _written(self._fd, line, self._size)
        self._unsynced = True
        self._count(failed=failed)

    def sync(self) -> None:
        if self._unsynced:
            self._unsynced = False
            with _disk_errors(self.path):
                os.fsync(self._fd)

    def _count(self, *, failed: bool) -> None:
        self.answered, self.failed = self.answered + (not failed), self.failed + failed

    def _whole_lines(self) -> Iterator[bytes]:
        """The lines up to the first one without an end, or with bytes that a power cut lost."""
        with open(self._fd, "rb", buffering=1 << 20, closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") or _NUL in line:
                    # A power cut may have left NULs at the line's end, or only NULs.
                    begun = line.rstrip(_NUL)
                    if number == 1 and not (
                        begun.startswith(LINE_START) or LINE_START.startswith(begun)
                    ):
                        raise self._foreign(number)
                    return
                yield line

    def _checked(self, number: int, line: bytes, survey: Survey) -> tuple[int, bool]:
        """The number of a line's item, and whether the item failed."""
        try:
            kept = msgspec.json.decode(line, type=_Kept)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise self._foreign(number) from None
        if (place := place_of(kept.id)) is None:
            raise self._foreign(number)
        if not survey.holds(*place):
            raise UsageError(
                f"line {number} of {self.path} is of another input, or the input, --prompt or "
                "--max-tokens has changed",
                hint="name another output for what is asked now",
            )
        return place[0], kept.error is not None

    def _foreign(self, number: int) -> UsageError:
        return UsageError(
            f"line {number} of {self.path} is none of a batch",
            hint="name another output: this one holds something else",
        )


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """A new file, locked, that gets this path at the end; after any error it is removed."""
    descriptor, name = open_beside(path)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        yield descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        os.close(descriptor)
        with suppress(OSError):
            os.unlink(name)
        raise
    sync_folder(path.parent)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}",
            hint="make room, or allow it, and give the same command again: all lines in it count",
        ) from None


def _written(descriptor: int, line: bytes, size: int) -> int:
    """Write a line; returns the new size. If the disk is full, no part of the line stays."""
    left = memoryview(line)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except BaseException:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
    return size + len(line)


def _open_locked(path: Path) -> int:
    while True:
        with _disk_errors(path), ExitStack() as stack:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            stack.callback(os.close, descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UsageError(
                    f"{path} is no file", hint="name a file: what stands in it is taken up again"
                )
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UsageError(
                    f"another turbofit batch writes {path}",
                    hint="wait for its end, or name another output",
                ) from None
            with suppress(FileNotFoundError):  # another batch may have replaced it
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    stack.pop_all()
                    return descriptor
