"""What a terminal is: whether there is one, its width, whether it takes colours."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["WINDOWS", "is_terminal", "redraws", "takes_colour", "width"]

WINDOWS: Final = os.name == "nt"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether people look at it; None is a stream that was closed before Python began."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def redraws(stream: TextIO | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a line can be written anew in its place; a screen reader wants lines that stay."""
    return is_terminal(stream) and _is_smart(environ)


def takes_colour(environ: Mapping[str, str]) -> bool:
    """Whether a terminal reads ANSI escape codes; of Windows' own, Windows Terminal does."""
    return not environ.get("NO_COLOR") and _is_smart(environ)


def width(stream: TextIO | None = None) -> int:
    """Columns of a terminal, by default standard output's: COLUMNS where that is set, else 80."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _is_smart(environ: Mapping[str, str]) -> bool:
    if environ.get("TERM") == "dumb":
        return False
    return not WINDOWS or "WT_SESSION" in environ or "TERM" in environ
