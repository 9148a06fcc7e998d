"""Queues of log lines, written by a thread: a pipe that nobody reads never stops a server."""

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

#: The most bytes that may wait in a queue.
_ROOM: Final = 1 << 20
#: Seconds between two writes.
_PAUSE: Final = 0.02
#: The time in seconds to write the last lines at the end, and the pause between two checks.
_LAST_SECONDS, _LOOK = 1.0, 0.001

#: Number of lines, in all logs of this process, that were not written; and the lock for it.
_DROPPED: Final = [0]
_COUNTING: Final = _thread.allocate_lock()


def dropped_lines() -> int:
    """The number of lines that this process's logs lost."""
    return _DROPPED[0]


class _Waiting(NamedTuple):
    """Text that waits to be written.

    ``lines`` counts the text's own lines, without notices of lost lines; ``missing`` counts the
    lost lines that these notices report; if the text itself is lost, the report is lost with it.
    """

    text: bytes
    lines: int
    missing: int


class LogQueue:
    """Takes whole lines of one log and writes them in a thread; drops lines when it is full.

    ``write`` may block or fail. ``notice`` makes the line that stands in place of dropped lines and
    says how many they are. ``room`` is the most bytes that may wait.
    """

    def __init__(
        self,
        write: Callable[[bytes], object],
        notice: Callable[[int], bytes] | None = None,
        room: int = _ROOM,
    ) -> None:
        self._write, self._notice, self._room = write, notice, room
        # SimpleQueue is C code, so the exception of a signal handler never leaves it half changed.
        self._lines: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._lock, self._pause = _thread.allocate_lock(), _thread.allocate_lock()
        self._pause.acquire()  # released when somebody waits
        self._held = self._missing = 0
        self._runs = False

    def put(self, data: bytes) -> None:
        """Queue lines for writing; returns at once."""
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
        """Wait at most ``seconds`` until all lines are written; returns whether they are."""
        until = time.monotonic() + seconds
        with suppress(RuntimeError):  # another thread waits already
            self._pause.release()
        while self._held and time.monotonic() < until:
            time.sleep(_LOOK)
        return not self._held

    def close(self) -> bool:
        """End the thread after a last attempt to write; returns whether all is written."""
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
        """Write lines, then a notice of the lines that were dropped after them."""
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
        """The notice of dropped lines, and their number; both are then reset."""
        missing, self._missing = self._missing, 0
        return (self._notice(missing) if missing and self._notice is not None else b""), missing


class CappedLog(LogQueue):
    """A log file that starts again at a size limit; the previous one is kept as ``.1``.

    A file is at most as large as ``cap`` plus the bytes that may wait. If the file cannot be opened
    and is not ``required``, each write tries again.

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
        #: Why the file could not be opened; empty if it could.
        self.error = ""
        try:
            self._open()
        except OSError as exc:
            if required:
                raise
            self.error = exc.strerror or str(exc)

    def close(self) -> bool:
        """Close the file after the last lines are written; a disk that hangs is not waited for."""
        written = super().close()
        if written and self._file is not None:
            self._file.close()
        return written

    def _open(self) -> FileIO:
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        return self._file

    def _append(self, data: bytes) -> None:
        """Write lines completely, or not at all."""
        file = self._open()
        size = file.seek(0, os.SEEK_END) if file.seekable() else 0
        if size and size + len(data) > self._cap:
            with suppress(FileNotFoundError):  # somebody removed the file
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
    """A text stream that never blocks: a queue writes its text."""

    def __init__(self, stream: Any, lines: LogQueue) -> None:
        self._stream, self._lines = stream, lines

    def write(self, text: str) -> int:
        """Queue a text for writing; returns the number of its characters."""
        self._lines.put(text.encode(self._stream.encoding or "utf-8", "backslashreplace"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Queue several lines for writing."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Do nothing, since a thread that flushes must not block either."""

    def settle(self) -> None:
        """Wait a moment until the lines are written, so that later output follows them."""
        self._lines.settle()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def queued_stderr() -> Iterator[None]:
    """Queue standard error in the block, so that no thread waits for a slow or stopped reader.

    At the end it waits a moment until the lines are written. If nobody reads them, standard error
    stays queued, since later messages must not block either.
    """
    before = sys.stderr
    try:
        # A duplicate, since the stream's number may become another file's while a line still waits.
        descriptor = os.dup(before.fileno())
        before.flush()
    except (AttributeError, OSError, ValueError):  # closed, or not a file
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
    """Write all data, however few bytes the system takes at once.

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
