"""Standard output, kept free for the answer while a library prints to it."""

from __future__ import annotations

import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator


#: The streams that were standard output when a block began, of all threads; None is a value, too.
_KEPT: Final[list[TextIO | None]] = []


def stdout() -> TextIO | None:
    """The stream for the answer; None if stdout was closed before Python started."""
    return _KEPT[0] if _KEPT else sys.stdout


@contextmanager
def kept_stdout() -> Iterator[None]:
    """Send what any thread prints in the block to stderr; only `stdout` still gives stdout."""
    _KEPT.append(stdout())
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _KEPT.pop()
