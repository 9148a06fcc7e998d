"""What a terminal can show: lines drawn anew, colours, columns."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping


WINDOWS: Final = os.name == "nt"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether people look at it; a stream that was closed before Python began is None."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def redraws(stream: TextIO | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a line can be written anew in its place."""
    return is_terminal(stream) and _is_smart(environ)


def takes_colour(environ: Mapping[str, str]) -> bool:
    """Whether a terminal reads ANSI escape codes."""
    return not environ.get("NO_COLOR") and _is_smart(environ)


def width(stream: TextIO | None = None) -> int:
    """Columns of a terminal, by default standard output's; COLUMNS comes first, 80 last."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _is_smart(environ: Mapping[str, str]) -> bool:
    if environ.get("TERM") == "dumb":  # as for a screen reader, which wants lines that stay
        return False
    return not WINDOWS or "WT_SESSION" in environ or "TERM" in environ
