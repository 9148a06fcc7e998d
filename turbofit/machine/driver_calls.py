"""Questions to a driver that may never answer, asked by a thread that must go on."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, TypeVar

from turbofit.core.process.log import LazyLogger

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ask_driver"]

_LOG: Final = LazyLogger(__name__)

_T = TypeVar("_T")

#: Seconds for an answer. A driver that nobody keeps loaded is loaded first, which takes seconds for
#: each GPU.
_SECONDS: Final = 30.0
#: The threads whose question is not answered.
_hung: list[threading.Thread] = []


def ask_driver(question: Callable[[], _T], otherwise: _T, *, seconds: float | None = None) -> _T:
    """The answer to a question, asked in a thread of its own.

    Args:
        question: what it raises is raised here.
        otherwise: the answer where none comes in time, and at once as long as that thread, or
            another one of this process, still waits for its own.
        seconds: for an answer; None: 30.
    """
    _hung[:] = [thread for thread in _hung if thread.is_alive()]
    if _hung:
        return otherwise
    answer: Future[_T] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except BaseException as exc:  # noqa: BLE001 - who asked gets it
            answer.set_exception(exc)

    thread = threading.Thread(target=ask, name="driver-call", daemon=True)
    thread.start()
    longest = _SECONDS if seconds is None else seconds
    thread.join(longest)
    if not answer.done():
        _hung.append(thread)
        _LOG.info("the driver has not answered for %g s", longest)
        return otherwise
    return answer.result()
