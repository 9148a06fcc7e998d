"""NVML's view of one GPU while a program runs: used memory, and what it was between marks."""

from __future__ import annotations

import threading
import time
from typing import Any

__all__ = ["Sampler", "free_bytes", "used_bytes"]


def used_bytes(index: int) -> int:
    """Bytes that NVML counts as used on a GPU, by whomever; reserved ones apart."""
    return int(_memory(index).used)


def free_bytes(index: int) -> int:
    """Bytes that NVML counts as free on a GPU."""
    return int(_memory(index).free)


def _memory(index: int) -> Any:
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        version: Any = getattr(pynvml, "nvmlMemory_v2", None)
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=version)
    finally:
        pynvml.nvmlShutdown()


class Sampler:
    """Samples a GPU's used bytes every few milliseconds until it is closed.

    Args:
        index: NVML's index.
        seconds: between samples.
    """

    def __init__(self, index: int, seconds: float = 0.01) -> None:
        self._index, self._seconds = index, seconds
        self._samples: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> dict[str, int] | None:
        """Peak and last value between two times of `time.monotonic`, None without a sample."""
        inside = [used for at, used in self._samples if begin <= at <= end]
        return {"peak": max(inside), "last": inside[-1]} if inside else None

    def _run(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(self._index)
        version: Any = getattr(pynvml, "nvmlMemory_v2", None)
        while not self._over.is_set():
            used = int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=version).used)
            self._samples.append((time.monotonic(), used))
            self._over.wait(self._seconds)
        pynvml.nvmlShutdown()
