"""The output: what is answered already, one line after the other, and nothing twice.

The output file is the only state. Each line goes to the kernel in
one piece before its item counts, so that it outlives the process; once a second all lines go to
the disk, so that a power cut costs the last second, whose items are sent again. The lock is the
kernel's, on the output itself, and ends with the process.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.batch.item import LINE_START, place_of
from turbofit.core.errors import UsageError
from turbofit.core.process.files import open_beside, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from turbofit.batch.survey import Survey

__all__ = ["OutputFile"]

_BUSY: Final = (BlockingIOError, PermissionError)
_NUL: Final = b"\0"


class _Kept(msgspec.Struct):
    """What is read of a line that stands in the output."""

    id: str
    error: Any = None


class OutputFile:
    """Opened and locked; a context manager.

    Args:
        path: the output; failures go to ``PATH.errors.jsonl`` too.

    Raises:
        UsageError: it cannot be written, or another batch writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.errors_path = path, path.with_name(path.name + ".errors.jsonl")
        self._fd = _open_locked(path)
        #: The output itself, where ``path`` is a link to it.
        self._real = path.resolve()
        #: The file of failures, and that of the lines that stay where some do not.
        self._errors = self._kept = -1
        #: By the path that a new file gets: its name until it is whole.
        self._unnamed: dict[Path, str] = {}
        #: Bytes that are whole lines.
        self._size = self._errors_size = 0
        self._unsynced = False
        self.answered = self.failed = 0

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, survey: Survey, *, retry_failed: bool) -> int:
        """Mark in ``survey`` what is done, cut off what is no whole line.

        Args:
            survey: of the input.
            retry_failed: take the lines of failed items out, so that they are sent again.

        Returns:
            Bytes of the lines that stay.

        Raises:
            UsageError: a line is of another input, or of no batch.
        """
        with self._disk_errors():
            # Written anew: the output may have more failures than the file had.
            self._errors = self._begin(self.errors_path)
        self._read(survey, drop_failed=retry_failed)
        with self._disk_errors():
            if self._kept >= 0:
                self._replace()
            os.ftruncate(self._fd, self._size)
            self._end(self.errors_path)
            os.fsync(self._fd)
            sync_folder(self.path.parent)
        return self._size

    def append(self, line: bytes, *, failed: bool) -> None:
        """One line, whole or not at all.

        Raises:
            UsageError: the disk is full, or takes no more for another reason.
        """
        with self._disk_errors():
            self._size = _written(self._fd, line, self._size)
            self._unsynced = True
            if failed:
                self.failed += 1
                self._errors_size = _written(self._errors, line, self._errors_size)
            else:
                self.answered += 1

    def sync(self) -> None:
        """Have all lines on the disk.

        Raises:
            UsageError: the disk does not take them.
        """
        if self._unsynced:
            self._unsynced = False
            with self._disk_errors():
                os.fsync(self._fd)

    def close(self) -> None:
        """Unlock and close it; remove the file of failures where there are none."""
        unneeded = [*self._unnamed.values()]
        if not unneeded and self._errors >= 0 and not self._errors_size:
            unneeded = [str(self.errors_path)]
        for name in unneeded:
            with suppress(OSError):
                os.unlink(name)
        for fd in (self._errors, self._kept, self._fd):
            if fd >= 0:
                os.close(fd)
        self._errors = self._kept = self._fd = -1

    def _read(self, survey: Survey, *, drop_failed: bool) -> None:
        """Mark each line; those that stay go to another file where some do not."""
        for number, line in enumerate(self._whole_lines(), 1):
            place, failed = self._checked(number, line, survey)
            with self._disk_errors():
                if failed and drop_failed:
                    self._copy()
                    continue
                if not survey.mark(place):
                    raise UsageError(
                        f"line {number} of {self.path} is the second of its item",
                        hint="take one of the two out, or name another output",
                    )
                if self._kept >= 0:
                    _written(self._kept, line, self._size)
                self._size += len(line)
                if failed:
                    self._errors_size = _written(self._errors, line, self._errors_size)
            self.answered, self.failed = self.answered + (not failed), self.failed + failed

    def _whole_lines(self) -> Iterator[bytes]:
        """Up to the first that has no end, or that a power cut left without its bytes."""
        with open(self._fd, "rb", buffering=1 << 20, closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") or _NUL in line:
                    if number == 1 and not _is_begun(line):
                        raise self._foreign(number)
                    return
                yield line

    def _checked(self, number: int, line: bytes, survey: Survey) -> tuple[int, bool]:
        """The item's number, and whether it failed."""
        try:
            found = msgspec.json.decode(line, type=_Kept)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            found = None
        place = place_of(found.id) if found else None
        if found is None or place is None:
            raise self._foreign(number)
        if not survey.holds(*place):
            raise UsageError(
                f"line {number} of {self.path} is of another input, or the input has changed",
                hint="name another output for this input",
            )
        return place[0], found.error is not None

    def _foreign(self, number: int) -> UsageError:
        return UsageError(
            f"line {number} of {self.path} is none of a batch",
            hint="name another output: this one holds something else",
        )

    def _copy(self) -> None:
        """Begin the file of the lines that stay with those before this one."""
        if self._kept >= 0:
            return
        self._kept = self._begin(self._real)
        at = 0
        while at < self._size and (data := os.pread(self._fd, min(self._size - at, 1 << 20), at)):
            at = _written(self._kept, data, at)

    def _replace(self) -> None:
        """The output is that file now, locked before anybody can open it by its name."""
        os.fsync(self._kept)
        fcntl.flock(self._kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._end(self._real)
        sync_folder(self._real.parent)
        os.close(self._fd)
        self._fd, self._kept = self._kept, -1

    def _begin(self, path: Path) -> int:
        """A new file that gets this path at its end."""
        fd, self._unnamed[path] = open_beside(path)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        return fd

    def _end(self, path: Path) -> None:
        os.replace(self._unnamed[path], path)
        del self._unnamed[path]

    def _disk_errors(self) -> _DiskErrors:
        return _DiskErrors(self.path)


class _DiskErrors:
    """Turns an error of the disk into a UsageError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
        if isinstance(exc, OSError):
            raise _unwritable(self._path, exc) from None


def _is_begun(line: bytes) -> bool:
    """Whether a batch began this line; a power cut may have left NULs at its end, or only NULs."""
    begun = line.rstrip(_NUL)
    return begun.startswith(LINE_START) or LINE_START.startswith(begun)


def _written(fd: int, line: bytes, size: int) -> int:
    """The size with the line; where the disk does not take all of it, none of it stays."""
    left = memoryview(line)
    try:
        while left:
            left = left[os.write(fd, left) :]
    except BaseException:
        with suppress(OSError):
            os.ftruncate(fd, size)
        raise
    return size + len(line)


def _open_locked(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as exc:
            raise _unwritable(path, exc) from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(
                    f"{path} is no file", hint="name a file: what stands in it is taken up again"
                )
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except _BUSY:
            os.close(fd)
            raise UsageError(
                f"another turbofit batch writes {path}",
                hint="wait for its end, or name another output",
            ) from None
        except FileNotFoundError:  # replaced and gone meanwhile
            pass
        except OSError as exc:
            os.close(fd)
            raise _unwritable(path, exc) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _unwritable(path: Path, exc: OSError) -> UsageError:
    return UsageError(
        f"{path} cannot be written: {exc.strerror or exc}",
        hint="make room, or allow it, and give the same command again: all lines in it count",
    )
