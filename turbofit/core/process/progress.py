"""Progress: code reports steps and the progress of each step, and a listener may show both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

from turbofit.core.units import format_bytes

Listener = Callable[["Step | None"], None]


class Step(NamedTuple):
    """One step of the work; ``total`` is 0 if the amount of work is unknown."""

    doing: str
    done: float = 0.0
    total: float = 0.0
    unit: Literal["", "bytes", "requests", "s"] = ""
    detail: str = ""

    @property
    def text(self) -> str:
        """The step in words, without a time: ``loading weights: 3.2 GiB of 15.0 GiB``."""
        parts = [self.detail] if self.detail else []
        if self.total:
            done, total = min(self.done, self.total), self.total
            if self.unit == "bytes":
                parts.insert(0, f"{format_bytes(int(done))} of {format_bytes(int(total))}")
            else:
                parts.insert(0, f"{done:,.0f} of {total:,.0f} {self.unit}".rstrip())
        return f"{self.doing}: {', '.join(parts)}" if parts else self.doing


class _Reported(threading.local):
    """The step that each thread reported last."""

    step: Step | None = None


class _Listening:
    """The listener of the process, which is called for each reported step; may be None."""

    listener: Listener | None = None


_REPORTED: Final = _Reported()


def tell(step: Step | None) -> None:
    """Report the step that begins now; None: no step is running."""
    _REPORTED.step = step
    if _Listening.listener is not None:
        _Listening.listener(step)


def now() -> Step | None:
    """Return the step that this thread reported last."""
    return _REPORTED.step


@contextmanager
def under_way(doing: str) -> Iterator[None]:
    """Report a step at the beginning of the block, and the previous step again at its end."""
    before = _REPORTED.step
    tell(Step(doing))
    try:
        yield
    finally:
        tell(before)


def listening() -> bool:
    """Return whether the process has a listener; without a listener no costly step is computed."""
    return _Listening.listener is not None


@contextmanager
def listened(listener: Listener) -> Iterator[None]:
    """Call ``listener`` for each step that is reported in the block.

    The thread that reports the step calls ``listener``, so ``listener`` must not block.
    """
    before = _Listening.listener
    _Listening.listener, _REPORTED.step = listener, None
    try:
        yield
    finally:
        _Listening.listener, _REPORTED.step = before, None
