"""Standard output, kept for the answer while a library is in use that prints to it."""

from __future__ import annotations

import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Kept:
    """The process has one standard output, whichever thread writes to it."""

    stream: TextIO | None = None


def stdout() -> TextIO | None:
    """The stream of the answer; None where it was closed before Python began."""
    return _Kept.stream or sys.stdout


@contextmanager
def kept_stdout() -> Iterator[None]:
    """What any thread prints meanwhile goes to stderr, but for what `stdout` gets."""
    before, _Kept.stream = _Kept.stream, stdout()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _Kept.stream = before
