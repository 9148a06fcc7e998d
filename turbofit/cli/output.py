"""Standard output and error: the answer on one, everything else on the other."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from turbofit.core.json_types import Document
    from turbofit.report.painters.document import Block

__all__ = [
    "PAGE_WIDTH",
    "ProgressLine",
    "answer",
    "complain",
    "note",
    "painted",
    "patience",
    "prepare_streams",
    "show",
    "verbose_log",
    "write_page",
]

#: Columns of a help page.
PAGE_WIDTH: Final = 96
#: Seconds after which a person wonders.
_PATIENCE: Final = 1.0
#: Seconds between two lines of progress where nobody watches a terminal.
_SELDOM: Final = 10.0
_WINDOWS: Final = os.name == "nt"


def prepare_streams() -> None:
    """What a terminal cannot encode is escaped instead of being an error.

    On Windows a file or a pipe gets UTF-8 too: in its code page a plan's JSON cannot be read again.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace", encoding="utf-8" if _WINDOWS else None)


def answer(text: str) -> None:
    """Write the answer to stdout; a reader that has gone away is no error."""
    _write(sys.stdout, text)


def note(text: str) -> None:
    """Write one line of progress to stderr."""
    _write(sys.stderr, f"{text}\n")


class ProgressLine:
    """How far something is, on stderr: in place on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._in_place = _is_terminal(sys.stderr)
        self._told = float("-inf")

    def show(self, text: Callable[[], str]) -> None:
        """Write it, where it is time."""
        now = time.monotonic()
        if self._in_place:
            _write(sys.stderr, f"\r{text()}\x1b[K")
        elif now >= self._told + _SELDOM:
            self._told = now
            note(text())

    def clear(self) -> None:
        """Make room for what is said next."""
        if self._in_place:
            _write(sys.stderr, "\r\x1b[K")


@contextmanager
def patience(doing: str) -> Iterator[None]:
    """Say on a terminal what is going on, where it takes more than a second."""
    if not _is_terminal(sys.stderr):
        yield
        return
    timer = Timer(_PATIENCE, note, [f"{doing} …"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def verbose_log(level: int) -> Iterator[None]:
    """Write turbofit's log to stderr meanwhile.

    Args:
        level: 0 is nothing, 1 what INFO says, 2 and more what DEBUG says too.
    """
    if not level:
        yield
        return
    import logging

    from turbofit.report.painters.terminal import clean

    class CleanFormatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return clean(super().format(record))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(CleanFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("turbofit")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if level == 1 else logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def complain(document: Document, *, as_json: bool) -> None:
    """Print an error document: one line of cause and one of hint on stderr, or JSON on stdout."""
    if as_json:
        import json

        answer(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return
    from turbofit.report.painters.terminal import clean

    error = document["error"]
    note(f"error: {clean(error['message'])}")
    note(f"hint: {clean(error['hint'])}")


def show(blocks: Iterable[Block], *, markdown: bool = False) -> None:
    """Paint a document on stdout, as wide as the terminal between 80 and 120 columns."""
    if markdown:
        from turbofit.report.painters import markdown as painter

        answer(painter.paint(blocks))
        return
    answer(painted(blocks))


def write_page(text: str, file: str) -> None:
    """Write a page of HTML, and say where; ``-`` is stdout."""
    from turbofit.core.files import write_atomic

    if file == "-":
        answer(text)
        return
    write_atomic(file, text)
    answer(f"{file}\n")


def painted(blocks: Iterable[Block]) -> str:
    """A document as `show` paints it on stdout."""
    from turbofit.report.painters.terminal import paint

    terminal = _is_terminal(sys.stdout)
    return paint(
        blocks, width=_width() if terminal else 80, colour=terminal and _takes_colour(os.environ)
    )


def _takes_colour(environ: Mapping[str, str]) -> bool:
    """Whether a terminal reads ANSI escape codes; of Windows' own, Windows Terminal does."""
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        return False
    return not _WINDOWS or "WT_SESSION" in environ or "TERM" in environ


def _width() -> int:
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 80
    return min(max(columns, 80), 120)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # The interpreter flushes again at exit: give it a place where that works.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
