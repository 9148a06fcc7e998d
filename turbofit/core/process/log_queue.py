"""Log lines are written by a thread of their own: a pipe that nobody reads never stops a server."""

from __future__ import annotations

import _thread
import os
import queue
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO
    from pathlib import Path

#: Bytes that wait at most.
_ROOM: Final = 1 << 20
#: Seconds between two writes.
_PAUSE: Final = 0.02
#: Seconds that what waits has at the end, and between two looks at it.
_LAST_SECONDS, _LOOK = 1.0, 0.001

#: Lines of all logs of this process that were not written, and the lock of this count.
_DROPPED: Final = [0]
_COUNTING: Final = _thread.allocate_lock()


def dropped_lines() -> int:
    """How many lines of this process's logs were not written."""
    return _DROPPED[0]


class _Waiting(NamedTuple):
    """Text that waits to be written.

    ``lines`` are its own, without notices of lines that are missing; ``missing`` is what these
    notices count, which is lost with the text where it is not written.
    """

    text: bytes
    lines: int
    missing: int


class LogQueue:
    """Takes whole lines of one log, and writes them in a thread; what finds no room is dropped.

    ``write`` may wait, and may fail. ``notice`` makes the line that says how many are missing in
    its place. ``room``: bytes that may wait.
    """

    def __init__(
        self,
        write: Callable[[bytes], object],
        notice: Callable[[int], bytes] | None = None,
        room: int = _ROOM,
    ) -> None:
        self._write, self._notice, self._room = write, notice, room
        # Only C code: the exception of a signal's handler leaves none of it half done.
        self._lines: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._lock, self._pause = _thread.allocate_lock(), _thread.allocate_lock()
        self._pause.acquire()  # until somebody waits
        self._held = self._missing = 0
        self._runs = False

    def put(self, data: bytes) -> None:
        """Have lines written; returns at once."""
        lines = data.count(b"\n")
        with self._lock:
            if self._held and self._held + len(data) > self._room:
                self._lose(lines)
                return
            notice, missing = self._missed()
            self._held += len(notice) + len(data)
            begins, self._runs = not self._runs, True
        if begins:
            _thread.start_new_thread(self._run, ())
        self._lines.put(_Waiting(notice + data, lines, missing))

    def settle(self, seconds: float = _LAST_SECONDS) -> bool:
        """Wait until all is written, at most so long; whether it is."""
        until = time.monotonic() + seconds
        with suppress(RuntimeError):  # somebody else waits already
            self._pause.release()
        while self._held and time.monotonic() < until:
            time.sleep(_LOOK)
        return not self._held

    def close(self) -> bool:
        """End, once what waits is written, or nobody takes it; whether it is written."""
        written = self.settle()
        self._lines.put(None)
        return written

    def _run(self) -> None:
        ends = False
        while not ends:
            parts = [self._lines.get()]
            with suppress(queue.Empty):
                while True:
                    parts.append(self._lines.get_nowait())
            ends = None in parts
            waiting = [part for part in parts if part is not None]
            text = b"".join(part.text for part in waiting)
            lines = sum(part.lines for part in waiting)
            self._write_out(_Waiting(text, lines, sum(part.missing for part in waiting)))
            if not ends:
                self._pause.acquire(timeout=_PAUSE)

    def _write_out(self, waiting: _Waiting) -> None:
        """Write lines, then how many are missing after them."""
        text, lines, missing = waiting
        while text:
            written = True
            try:
                self._write(text)
            except (OSError, ValueError):
                written = False
            with self._lock:
                self._held -= len(text)
                if not written:
                    self._missing += missing
                    self._lose(lines)
                    return
                text, missing = self._missed() if self._lines.empty() else (b"", 0)
                lines = 0
                self._held += len(text)

    def _lose(self, lines: int) -> None:
        self._missing += lines
        with _COUNTING:
            _DROPPED[0] += lines

    def _missed(self) -> tuple[bytes, int]:
        """What stands in the place of lines that were dropped, and how many they are."""
        missing, self._missing = self._missing, 0
        return (self._notice(missing) if missing and self._notice is not None else b""), missing


class CappedLog(LogQueue):
    """A log file that begins anew at a size; the one before it is kept with ``.1`` appended.

    Each is never larger than ``cap`` and what may wait. What is not ``required`` and cannot be
    opened is tried again at each write.

    Raises:
        OSError: it is required, and cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        cap: int,
        notice: Callable[[int], bytes] | None = None,
        room: int = _ROOM,
        *,
        required: bool = True,
    ) -> None:
        super().__init__(self._append, notice, room)
        self._path, self._cap = path, cap
        self._file: FileIO | None = None
        #: Why it could not be opened.
        self.error = ""
        try:
            self._open()
        except OSError as exc:
            if required:
                raise
            self.error = exc.strerror or str(exc)

    def close(self) -> bool:
        """Close it once what waits is written; a disk that hangs is left alone."""
        written = super().close()
        if written and self._file is not None:
            self._file.close()
        return written

    def _open(self) -> FileIO:
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        return self._file

    def _append(self, data: bytes) -> None:
        """Write lines whole, or not at all."""
        file = self._open()
        size = file.seek(0, os.SEEK_END) if file.seekable() else 0
        if size and size + len(data) > self._cap:
            with suppress(FileNotFoundError):  # somebody has removed it
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("ab", buffering=0)
            file.close()
            file, size = self._file, 0
        try:
            _write_all(file.fileno(), data)
        except OSError:
            file.truncate(size)
            raise


class _QueuedStream:
    """A text stream that never waits: what is written to it goes through a queue."""

    def __init__(self, stream: Any, lines: LogQueue) -> None:
        self._stream, self._lines = stream, lines

    def write(self, text: str) -> int:
        """Have it written."""
        self._lines.put(text.encode(self._stream.encoding or "utf-8", "backslashreplace"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Have them written."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Do nothing: a thread that flushes must not wait either."""

    def settle(self) -> None:
        """Wait a moment for a reader: what is said elsewhere next comes after it."""
        self._lines.settle()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def queued_stderr() -> Iterator[None]:
    """Queue standard error meanwhile, so that a reader who is slow or stops holds up no thread.

    At the end the queue is written as far as it is read within a moment. Where it is not read,
    standard error stays queued: what is said after that must not wait either.
    """
    before = sys.stderr
    try:
        # Its own: the stream's number may be another file's while a line still waits.
        descriptor = os.dup(before.fileno())
        before.flush()
    except (AttributeError, OSError, ValueError):  # closed, or one of a program around this
        yield
        return

    lines = LogQueue(lambda data: _write_all(descriptor, data), _not_read)
    sys.stderr = queued = _QueuedStream(before, lines)
    try:
        yield
    finally:
        if lines.close():
            os.close(descriptor)
            if sys.stderr is queued:
                sys.stderr = before


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, whatever the system takes at once.

    Raises:
        OSError: it cannot be written.
    """
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # noqa: PERF203 - a pipe whose other owner does not wait
            from select import select

            select((), (descriptor,), ())


def _not_read(missing: int) -> bytes:
    return f"warning: lines missing here: {missing:,}; nobody read them\n".encode()
