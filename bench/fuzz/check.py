"""One input to one target: how it ends, and within which processor time."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

__all__ = ["LIMIT", "Finding", "TooSlow", "check", "expect"]

#: Seconds of processor time that one call may take.
LIMIT: Final = 1.0
_REPO: Final = Path(__file__).resolve().parents[2]
_OURS: Final = str(_REPO / "turbofit")


class TooSlow(BaseException):
    """A call took longer than it may."""


class Finding(NamedTuple):
    """An end that a target does not allow: a name that is the same for the same bug, and where."""

    name: str
    text: str


def check(one: Callable[[bytes], None], data: bytes, limit: float = LIMIT) -> Finding | None:
    """Give a target one input; None where the target ends as its docstring promises.

    To be called in the main thread: a timer of the process's CPU time ends what takes too long.
    """
    before = signal.signal(signal.SIGPROF, _late)
    try:
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            one(data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # noqa: BLE001 - whatever it is, it is a finding
        return Finding(_name(exc), "".join(traceback.format_exception(exc)))
    finally:
        with contextlib.suppress(TypeError, ValueError):
            signal.signal(signal.SIGPROF, before)
    return None


def expect(holds: bool, what: object) -> None:
    """What has to hold of a result; as `assert`, which `python -O` leaves out."""
    if not holds:
        raise AssertionError(str(what))


def _late(_: int, _frame: FrameType | None) -> None:
    raise TooSlow(f"the call takes more than {LIMIT:g} s")


def _name(exc: BaseException) -> str:
    """The kind of the error and the innermost line of turbofit's, as a file's name."""
    frames = traceback.extract_tb(exc.__traceback__)
    ours = [one for one in frames if one.filename.startswith(_OURS)]
    last = (ours or [one for one in frames if one.filename != __file__])[-1]
    where = Path(last.filename)
    if where.is_relative_to(_REPO):
        where = where.relative_to(_REPO)
    place = "-".join(where.with_suffix("").parts[-3:])
    # A timer strikes anywhere in a loop: its function is the same, its line is not.
    line = last.name if isinstance(exc, TooSlow) else str(last.lineno)
    return f"{type(exc).__name__}-{place}-{line}".replace("<", "").replace(">", "")
