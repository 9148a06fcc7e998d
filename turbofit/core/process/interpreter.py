"""Access to what a whole Python process shares: garbage collector, threads, standard output."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

T = TypeVar("T")
USUAL_THRESHOLDS: Final = gc.get_threshold()
#: The stream to standard output, once for each open block of `kept_stdout` in any thread.
_KEPT: Final[list[TextIO | None]] = []


async def in_thread(function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Run a function in a thread, and wait for its end, even if the caller's task is cancelled.

    The caller thus closes no file that the thread still uses.
    """
    import asyncio  # planning does not need asyncio

    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **keywords))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


def in_daemon_thread(function: Callable[[], T], name: str) -> Future[T]:
    """Begin a call in a new thread, and return the call's future, which cannot be cancelled.

    The call may never return, so the end of the process does not wait for the thread.
    """
    from concurrent.futures import Future
    from threading import Thread

    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()

    def call() -> None:
        try:
            answer.set_result(function())
        except BaseException as exc:  # noqa: BLE001 - who waits gets it
            answer.set_exception(exc)

    Thread(target=call, name=name, daemon=True).start()
    return answer


def collect_after(objects: int) -> None:
    """Delay the first garbage collection until this many ``objects`` exist.

    Later collections come as usual.
    """
    gc.callbacks.append(_collect_as_usual)
    gc.set_threshold(objects)


def _collect_as_usual(phase: str, _: dict[str, int]) -> None:
    """Restore the usual thresholds after the first garbage collection.

    Short commands end before this collection.
    """
    if phase == "stop":
        gc.callbacks.remove(_collect_as_usual)
        gc.set_threshold(*USUAL_THRESHOLDS)


def stdout() -> TextIO | None:
    """Return the stream to which a command writes its answer, also inside `kept_stdout`.

    None if standard output was closed before Python started.
    """
    return _KEPT[0] if _KEPT else sys.stdout


@contextmanager
def kept_stdout() -> Iterator[None]:
    """Redirect standard output to standard error in the block, for all threads.

    Only the stream that `stdout` returns still writes to standard output.
    """
    _KEPT.append(stdout())
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _KEPT.pop()
