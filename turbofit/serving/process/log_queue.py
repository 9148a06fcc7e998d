"""Logs with a thread that writes: an unread pipe or a full disk stops no server."""

from __future__ import annotations

import logging
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any, Final

#: The most texts that may wait in a log.
_MOST: Final = 4096
#: Seconds to write the last lines of a log at its end.
_LAST_SECONDS: Final = 1.0
#: Seconds between two checks whether all lines are written.
_LOOK: Final = 0.001
_NOT_READ: Final = "warning: lines are missing here: nobody read them\n"


class QueuedLog:
    """Takes whole lines and passes them to ``emit`` in a thread.

    Lines are lost if ``most`` texts wait already, or if ``emit`` fails. The text ``lost`` then
    comes once, before the next lines.
    """

    def __init__(
        self, emit: Callable[[logging.LogRecord], object], lost: str, most: int = _MOST
    ) -> None:
        # After a loss ``_notice`` is ``lost``, until the next lines come.
        self._emit, self._lost, self._notice = emit, lost, ""
        self._waiting: queue.Queue[Any] = queue.Queue(most)
        self._listener = QueueListener(self._waiting, self)  # type: ignore[arg-type]
        self._listener.start()

    def put(self, text: str) -> None:
        """Queue lines for writing; returns at once."""
        notice, self._notice = self._notice, ""
        try:
            self._waiting.put_nowait(logging.makeLogRecord({"msg": notice + text}))
        except queue.Full:
            self._notice = self._lost

    def handle(self, record: logging.LogRecord) -> None:
        """Write a record; the thread of the listener calls this method."""
        try:
            self._emit(record)
        except (OSError, ValueError):
            self._notice = self._lost

    def settle(self, seconds: float = _LAST_SECONDS) -> bool:
        """Wait at most ``seconds`` until all lines are written; return whether all are written."""
        until = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(_LOOK)
        return not self._waiting.unfinished_tasks

    def close(self) -> bool:
        """Wait a moment until all lines are written, then end the thread.

        Return whether all are written; if not, the thread goes on.
        """
        written = self.settle()
        if written:  # else the thread waits for a reader, and may wait for ever
            self._listener.stop()
        return written


class _File(RotatingFileHandler):
    """A log file without a buffer: if the disk hangs, a buffer's lock could block Python's end."""

    def _open(self) -> Any:
        return open(self.baseFilename, "ab", buffering=0)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a text, or raise an `OSError`."""
        if self.shouldRollover(record):
            self.doRollover()
        stream: Any = self.stream
        _write_all(stream.fileno(), record.msg.encode(errors="surrogateescape"))


class FileLog(QueuedLog):
    """A log file that starts again at ``cap`` bytes; the previous file is kept as ``.1``.

    If a file that is not ``required`` cannot be opened, each write tries again.

    Raises:
        OSError: the file is required, and cannot be opened.
    """

    def __init__(
        self, path: Path, cap: int, lost: str, most: int = _MOST, *, required: bool = True
    ) -> None:
        #: The reason why the file is not open; empty if the file is open.
        self.error = ""
        try:
            self._file = _File(path, maxBytes=cap, backupCount=1)
        except OSError as exc:
            if required:
                raise
            self.error = exc.strerror or str(exc)
            self._file = _File(path, maxBytes=cap, backupCount=1, delay=True)
        super().__init__(self._file.emit, lost, most)

    def close(self) -> bool:
        """Write the last lines and close the file; give up after a moment if the disk hangs.

        Return whether all lines are written.
        """
        written = super().close()
        if written:
            self._file.close()
        return written


class _QueuedStream:
    """A text stream that never blocks: a thread writes its text."""

    def __init__(self, stream: Any, log: QueuedLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Queue a text for writing; returns the number of its characters."""
        self._log.put(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Queue several lines for writing."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Do nothing: a thread that flushes must not block."""

    def settle(self) -> None:
        """Wait a moment for the lines to be written, so that later output follows these lines."""
        self._log.settle()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def queued_stderr() -> Iterator[None]:
    """Queue standard error in the block, so that no thread waits for a slow or stopped reader.

    The end of the block waits a moment for the lines to be written. If nobody reads the lines,
    standard error stays queued, because later messages must not block.
    """
    before = sys.stderr
    try:
        # A duplicate: while a line waits, the stream may close and another file get its number.
        descriptor = os.dup(before.fileno())
        before.flush()
    except (AttributeError, OSError, ValueError):  # closed, or not a file
        yield
        return

    def write(record: logging.LogRecord) -> None:
        text = record.msg.encode(before.encoding or "utf-8", "backslashreplace")
        _write_all(descriptor, text)

    log = QueuedLog(write, _NOT_READ)
    sys.stderr = queued = _QueuedStream(before, log)
    try:
        yield
    finally:
        if log.close():
            os.close(descriptor)
            if sys.stderr is queued:
                sys.stderr = before


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all data, however few bytes the system takes at once.

    Raises:
        OSError: the data cannot be written.
    """
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # noqa: PERF203 - a pipe whose other owner does not wait
            from select import select

            select((), (descriptor,), ())
