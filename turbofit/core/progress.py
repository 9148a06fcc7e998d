"""What is under way, and how far it is: the code that works tells, whoever shows it listens.

Nobody listens by default, and telling then costs nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

from turbofit.core.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Listener = Callable[["Step | None"], None]

__all__ = ["Step", "listened", "listening", "now", "tell", "under_way"]


class Step(NamedTuple):
    """What is going on; a step that is told again under the same name goes on.

    ``total`` is 0 where nobody knows how much there is to do. ``detail`` is what else people read.
    """

    doing: str
    done: float = 0.0
    total: float = 0.0
    unit: Literal["", "bytes", "s"] = ""
    detail: str = ""

    @property
    def text(self) -> str:
        """What people read, without a time: ``loading weights: 3.2 GiB of 15.0 GiB``."""
        told = [self.detail] if self.detail else []
        if self.total:
            done, total = min(self.done, self.total), self.total
            if self.unit == "bytes":
                told.insert(0, f"{format_bytes(int(done))} of {format_bytes(int(total))}")
            else:
                told.insert(0, f"{done:,.0f} of {total:,.0f} {self.unit}".rstrip())
        return f"{self.doing}: {', '.join(told)}" if told else self.doing


class _Told:
    """The process has one terminal: one listener, and one step that is told of."""

    listener: Listener | None = None
    step: Step | None = None


def tell(step: Step | None) -> None:
    """Say what is going on from now on; None: nothing that anybody waits for."""
    _Told.step = step
    if _Told.listener is not None:
        _Told.listener(step)


def now() -> Step | None:
    """What was told last."""
    return _Told.step


@contextmanager
def under_way(doing: str) -> Iterator[None]:
    """Say what is going on meanwhile, where nothing inside tells more; then what was before it.

    >>> with under_way("planning"):
    ...     pass
    """
    before = _Told.step
    tell(Step(doing))
    try:
        yield
    finally:
        tell(before)


def listening() -> bool:
    """Whether somebody listens: what a step would cost to find out is spent only then."""
    return _Told.listener is not None


@contextmanager
def listened(listener: Listener) -> Iterator[None]:
    """Hear every step meanwhile.

    Args:
        listener: called in the thread that tells; it must not block.
    """
    before = _Told.listener
    _Told.listener, _Told.step = listener, None
    try:
        yield
    finally:
        _Told.listener, _Told.step = before, None
