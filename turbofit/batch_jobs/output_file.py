"""Reads and writes the output file of a batch. The file shows which items are answered.

A batch has no other state. An item counts as answered once the kernel has its whole line: the line
survives if the process is killed. All lines are synced to the disk once a second: after a power cut
only the items of the last second are sent again. Each sync checks that the file is still at its
path, and has all its lines and no bytes of another program. The file stays locked until the process
ends.
"""

from __future__ import annotations

import fcntl
import os
import stat
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.process.files import sync_folder
from turbofit.core.struct import JsonObject, Struct

CHAT: Final = "/v1/chat/completions"
#: The beginning of every line of an output.
LINE_START: Final = b'{"id":"batch_req_'
_NUL: Final = b"\0"


class ItemError(Exception):
    """Raised if an item cannot be sent, or gets no answer.

    The item's output line has the error, and the batch goes on with the other items. ``code`` is a
    short stable word for programs, such as ``image_missing``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        #: The text of the error; bytes of a file's name that JSON does not accept are escaped.
        self.message = message.encode(errors="backslashreplace").decode()


class BatchItem(Struct):
    """One item of a batch's input.

    ``number`` counts the lines of a JSONL file, or the images of a folder, from 1. ``digest`` is a
    checksum of the item's content, and never 0; another digest shows that the input has changed.
    Images in ``body`` may be paths of files. ``fault`` says why the item cannot be sent.
    """

    number: int
    digest: int
    custom_id: str | None = None
    url: str = CHAT
    body: JsonObject = msgspec.field(default_factory=dict)
    fault: ItemError | None = None

    @property
    def line_id(self) -> str:
        return f"batch_req_{self.number}-{self.digest:08x}"


class BatchLine(Struct):
    """One line of an output, in the form of OpenAI's batches.

    ``response`` has ``status_code``, ``request_id``, and the unchanged JSON of the server as
    ``body``. ``error`` has ``code`` and ``message``; it is None if the item succeeded.
    """

    id: str
    custom_id: str | None
    response: JsonObject | None = None
    error: JsonObject | None = None


class Survey:
    """Counts the items of an input, and marks items that have a line, in 5 bytes for each item."""

    def __init__(self, items: Iterable[BatchItem]) -> None:
        #: Digests by the item's number; 0 for a number without an item, such as an empty line's.
        self._digests = array("I", [0])
        self.total = 0
        for item in items:
            self._digests.extend([0] * (item.number - len(self._digests)))
            self._digests.append(item.digest)
            self.total += 1
        #: For each item's number, whether it has a line.
        self.done = bytearray(len(self._digests))

    def holds(self, number: int, digest: int) -> bool:
        return 0 < number < len(self._digests) and self._digests[number] == digest

    def pending(self, items: Iterable[BatchItem]) -> Iterator[BatchItem]:
        """Read the input again, and yield the items that have no line.

        Raises:
            UsageError: the input has changed.
        """
        remaining = self.total
        for item in items:
            if not self.holds(item.number, item.digest):
                break
            remaining -= 1
            if not self.done[item.number]:
                yield item
        if remaining:
            raise UsageError(
                f"the input has changed while it was read, at item {self.total - remaining + 1}",
                hint="give the same command again once nobody changes the input",
            )


class _Kept(msgspec.Struct):
    """The parts of an output line that are read when a batch is continued."""

    id: Annotated[str, msgspec.Meta(pattern=r"^batch_req_\d{1,12}-[0-9a-f]{8}$")]
    error: Any = None


class OutputFile:
    """An output file, opened and locked; close it at the end.

    Raises:
        UsageError: the file cannot be written, or another batch is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open_locked(path)
        #: The size of all whole lines, in bytes, after `resume` has checked them.
        self._size = 0
        #: The size with the line that is being appended; without a limit before `resume`.
        self._most = float("inf")
        self.answered = self.failed = 0

    def close(self) -> None:
        os.close(self._fd)

    @property
    def lines(self) -> int:
        """The number of items that have a line."""
        return self.answered + self.failed

    def resume(self, survey: Survey) -> None:
        """Mark in the survey the items that have a line, and cut off an incomplete last line.

        Raises:
            UsageError: a line belongs to another input, or to no batch.
        """
        with _disk_errors(self.path):
            for number, line in enumerate(self._whole_lines(), 1):
                place, failed = self._checked(number, line, survey)
                if survey.done[place]:
                    raise UsageError(
                        f"line {number} of {self.path} is the second line of one item",
                        hint="remove one of the two lines, or name another output",
                    )
                survey.done[place] = True
                self._count(len(line), failed=failed)
            os.ftruncate(self._fd, self._size)
            self._most = self._size
            os.fsync(self._fd)
            sync_folder(self.path.parent)

    def append(self, line: bytes, *, failed: bool) -> None:
        """Append a line, whole or not at all; call `resume` first.

        Raises:
            UsageError: the disk refuses the line, or another program has written to the file.
        """
        rest = memoryview(line)
        with _disk_errors(self.path):
            if os.fstat(self._fd).st_size > self._size:
                raise self._written_by_others()
            self._most = self._size + len(line)
            try:
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except BaseException:
                with suppress(OSError):  # after a full disk no part of the line may stay
                    os.ftruncate(self._fd, self._size)
                raise
        self._count(len(line), failed=failed)

    def sync(self) -> None:
        """Bring all lines to the disk.

        Raises:
            UsageError: the disk refuses the lines, the file was removed, replaced or cut, or
                another program has written to it.
        """
        size = self._size  # another thread may append a line during this call
        with _disk_errors(self.path):
            os.fsync(self._fd)
            now = os.fstat(self._fd)
            there = os.path.exists(self.path) and os.path.samestat(now, os.stat(self.path))
        if not there or now.st_size < size:
            raise UsageError(
                f"{self.path} was removed, replaced or cut while it was written",
                hint="give the same command again: items without a line are sent again",
            )
        if now.st_size > self._most:
            raise self._written_by_others()

    def _written_by_others(self) -> UsageError:
        return UsageError(
            f"another program has written to {self.path} meanwhile",
            hint="remove what it has written, and give the same command again: it sends only items"
            " without a line",
        )

    def _count(self, size: int, *, failed: bool) -> None:
        self._size += size
        self.answered, self.failed = self.answered + (not failed), self.failed + failed

    def _whole_lines(self) -> Iterator[bytes]:
        """Yield the complete lines of the output, up to the first damaged line.

        A line is damaged if its end is missing, or if a power cut has left NUL bytes in it.
        """
        with open(self._fd, "rb", buffering=1 << 20, closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") or _NUL in line:
                    # A power cut may have left NUL bytes at the end of the line, or in all of it.
                    # The file is cut here, so its first line must begin like a line of a batch.
                    begun = line.rstrip(_NUL)
                    if number == 1 and not (
                        begun.startswith(LINE_START) or LINE_START.startswith(begun)
                    ):
                        raise self._foreign(number)
                    return
                yield line

    def _checked(self, number: int, line: bytes, survey: Survey) -> tuple[int, bool]:
        """Return the number of a line's item, and whether the item failed."""
        try:
            kept = msgspec.json.decode(line, type=_Kept)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise self._foreign(number) from None
        place, digest = kept.id.removeprefix("batch_req_").split("-")
        if not survey.holds(int(place), int(digest, 16)):
            raise UsageError(
                f"line {number} of {self.path} is of another input, or the input, --prompt or "
                "--max-tokens has changed",
                hint="name another output, or give the input and the options of the first run",
            )
        return int(place), kept.error is not None

    def _foreign(self, number: int) -> UsageError:
        """Return the error for a line that is no line of a batch."""
        hint = "name another output: this file has other content"
        if number > 1:
            hint = "remove this line if another program has written it, or name another output"
        return UsageError(f"line {number} of {self.path} is no line of a batch", hint=hint)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Raise a UsageError for an error of the disk."""
    try:
        yield
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}",
            hint="make its folder, make room, or let this user write the file; then give the same"
            " command again: it sends only items without a line",
        ) from None


def _open_locked(path: Path) -> int:
    """Open and lock the output file; return its descriptor.

    Raises:
        UsageError: the path is no regular file, or the file cannot be written or is locked.
    """
    with _disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(
                f"{path} is no file", hint="name a file: a batch continues after its lines"
            )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(
                f"another turbofit batch writes {path}",
                hint="wait until the other batch ends, or name another output",
            ) from None
    return descriptor
