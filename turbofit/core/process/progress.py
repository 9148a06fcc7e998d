"""What is under way, and how far it is: the code that works tells the listener, if there is one."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from turbofit.core.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Listener = Callable[["Step | None"], None]


class Step(NamedTuple):
    """What is going on; ``total`` is 0 where nobody knows how much there is to do."""

    doing: str
    done: float = 0.0
    total: float = 0.0
    unit: Literal["", "bytes", "requests", "s"] = ""
    detail: str = ""

    @property
    def text(self) -> str:
        """What people read, without a time: ``loading weights: 3.2 GiB of 15.0 GiB``."""
        parts = [self.detail] if self.detail else []
        if self.total:
            done, total = min(self.done, self.total), self.total
            if self.unit == "bytes":
                parts.insert(0, f"{format_bytes(int(done))} of {format_bytes(int(total))}")
            else:
                parts.insert(0, f"{done:,.0f} of {total:,.0f} {self.unit}".rstrip())
        return f"{self.doing}: {', '.join(parts)}" if parts else self.doing


class _Told(threading.local):
    """The step that this thread told last; where it ends, no step of another thread comes back."""

    step: Step | None = None


class _Heard:
    """The process has one terminal, and so one listener."""

    listener: Listener | None = None
    #: What all steps are a part of: see `part_of`.
    whole: Callable[[], Step] | None = None


_TOLD: Final = _Told()


def tell(step: Step | None) -> None:
    """Say what is going on from now on; None: nothing."""
    _TOLD.step = step
    if _Heard.listener is None:
        return
    if step is not None and _Heard.whole is not None:
        whole = _Heard.whole()
        detail = ", ".join(filter(None, (step.detail, whole.detail)))
        step = step._replace(doing=f"{whole.doing}: {step.doing}", detail=detail)
    _Heard.listener(step)


def now() -> Step | None:
    """What this thread told last."""
    return _TOLD.step


@contextmanager
def under_way(doing: str) -> Iterator[None]:
    """Say what is going on meanwhile, where nothing inside tells more; then what was before it."""
    before = _TOLD.step
    tell(Step(doing))
    try:
        yield
    finally:
        tell(before)


@contextmanager
def part_of(whole: Callable[[], Step]) -> Iterator[None]:
    """Name what every step told meanwhile, in any thread, is a part of; asked at each of them."""
    before, _Heard.whole = _Heard.whole, whole
    try:
        yield
    finally:
        _Heard.whole = before
        tell(now())


def listening() -> bool:
    """Whether somebody listens, for steps that are not free."""
    return _Heard.listener is not None


@contextmanager
def listened(listener: Listener) -> Iterator[None]:
    """Hear every step meanwhile, in the thread that tells it; ``listener`` must not block."""
    before = _Heard.listener
    _Heard.listener, _TOLD.step = listener, None
    try:
        yield
    finally:
        _Heard.listener, _TOLD.step = before, None
