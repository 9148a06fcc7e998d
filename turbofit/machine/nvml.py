"""The only module that uses pynvml: its queries return ``NA`` if the driver has no answer.

Answers have type ``Any``, since pynvml has no types; each caller converts the values that it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, Final, TypeVar

from typing_extensions import Self

from turbofit.core.errors import NoGpuError, PackageError
from turbofit.core.process.interpreter import in_daemon_thread
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import NA

_LOG: Final = LazyLogger(__name__)

_INVALID_ARGUMENT: Final = 2
_NOT_SUPPORTED: Final = 3
_GPU_IS_LOST: Final = 15
_RESET_REQUIRED: Final = 16
_ELSEWHERE: Final = "describe a machine with `--on SPEC`, e.g. `--on 4xrtx3090`"

_T = TypeVar("_T")
#: The most seconds that a query takes. The first query loads a driver that is not loaded yet, which
#: takes seconds for each GPU.
_SECONDS: Final = 30.0
#: Queries that the driver has not answered yet.
_hung: list[Future[Any]] = []


class GpuLostError(Exception):
    """The GPU fell off the bus, or must be reset, during a query."""


class Nvml:
    """An open NVML library, as a context manager.

    Raises:
        NoGpuError: there is no NVML library, no driver, or the driver does not answer.
        PackageError: nvidia-ml-py is not installed.
    """

    #: The driver's words for the last error of a query.
    reason = "no reason given"

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise PackageError(
                "nvidia-ml-py is not installed", hint=f"pip install nvidia-ml-py, or {_ELSEWHERE}"
            ) from None
        self._library: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as exc:
            raise NoGpuError(
                f"NVML cannot be opened: {exc}", hint=f"check nvidia-smi, or {_ELSEWHERE}"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(self._library.NVMLError):
            self._library.nvmlShutdown()

    def query(self, function: str, *args: Any) -> Any:
        """Call a function of NVML; returns its answer, or ``NA`` if the driver or GPU has none.

        Raises:
            GpuLostError: the GPU is gone.
        """
        return self._ask(function, *args)[0]

    def query_and_support(self, function: str, *args: Any) -> tuple[Any, bool]:
        """Call a function of NVML; return the answer, and whether the GPU supports the function."""
        value, code = self._ask(function, *args)
        return value, code not in (_NOT_SUPPORTED, _INVALID_ARGUMENT)

    def memory(self, handle: Any) -> Any:
        """Return NVML's sizes of a device's memory, with the part that the driver reserves.

        Returns ``NA``, or raises an error, as `query` does.
        """
        return self.query("nvmlDeviceGetMemoryInfo", handle, self._library.nvmlMemory_v2)

    def _ask(self, function: str, *args: Any) -> tuple[Any, int]:
        """Call a function of NVML; return the answer or ``NA``, and NVML's error code (0: none)."""
        try:
            return getattr(self._library, function)(*args), 0
        # A text is not UTF-8, or the driver lacks a function's newest version: no NVMLError.
        except (UnicodeDecodeError, self._library.NVMLLibraryMismatchError) as exc:
            _LOG.debug("%s: %s", function, exc)
            return NA, 0
        except self._library.NVMLError as exc:
            code, self.reason = int(exc.value), str(exc)
            _LOG.debug("%s: %s", function, exc)
        if code in (_GPU_IS_LOST, _RESET_REQUIRED):
            raise GpuLostError(self.reason)
        return NA, code


def answered(value: Any) -> bool:
    """Return whether a value is an answer; pynvml's structures cannot be compared with ``NA``."""
    return not (isinstance(value, str) and value == NA)


def ask_driver(question: Callable[[], _T], otherwise: _T, *, seconds: float | None = None) -> _T:
    """Call ``question`` in a thread; returns its result, or raises its exception.

    Returns ``otherwise`` if the driver does not answer within ``seconds`` (None: 30). While an
    earlier query of this process has no answer, returns ``otherwise`` at once.
    """
    _hung[:] = [query for query in _hung if not query.done()]
    if _hung:
        return otherwise
    answer = in_daemon_thread(question, "driver-call")
    longest = _SECONDS if seconds is None else seconds
    wait([answer], longest)
    if not answer.done():
        _hung.append(answer)
        _LOG.info("the driver has not answered for %g s", longest)
        return otherwise
    return answer.result()
