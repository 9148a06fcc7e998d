"""Standard output, kept free for the answer while a library prints to it."""

from __future__ import annotations

import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Kept:
    """The process's standard output, which all threads share."""

    stream: TextIO | None = None
    #: Whether `stream` is it: None is a value, too.
    is_set = False


def stdout() -> TextIO | None:
    """The stream for the answer; None if stdout was closed before Python started."""
    return _Kept.stream if _Kept.is_set else sys.stdout


@contextmanager
def kept_stdout() -> Iterator[None]:
    """Send what any thread prints in the block to stderr; only `stdout` still gives stdout."""
    before = _Kept.stream, _Kept.is_set
    _Kept.stream, _Kept.is_set = stdout(), True
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _Kept.stream, _Kept.is_set = before
