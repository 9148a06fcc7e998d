"""Used memory of GPUs by NVML while a program runs on them: over time, and at most."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.machine.nvml import GpuLostError, Nvml, answered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

_SECONDS: Final = 0.01
#: Seconds to wait for a running query: a driver that lost a card may never answer.
_LAST_SECONDS: Final = 10.0


class SampledRange(NamedTuple):
    """Used bytes of one GPU over some time: the largest and the last value."""

    peak: int
    last: int


class Sampler:
    """Samples the used memory of GPUs every few milliseconds until closed; a context manager.

    It may miss a peak shorter than its interval. Allocators that keep their memory (TurboMind's
    pools, torch's segments) show their peak for long.

    Args:
        uuids: NVML's names of the GPUs.
        seconds: the interval between samples.
    """

    def __init__(self, uuids: Sequence[str], seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._samples: dict[str, list[tuple[float, int]]] = {uuid: [] for uuid in uuids}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_LAST_SECONDS)

    def between(self, uuid: str, begin: float, end: float) -> SampledRange | None:
        """The largest and last bytes between two `time.monotonic` times; None without a sample."""
        inside = [used for at, used in self._samples[uuid] if begin <= at <= end]
        return SampledRange(peak=max(inside), last=inside[-1]) if inside else None

    def _run(self) -> None:
        with Nvml() as nvml:
            while not self._over.is_set():
                for uuid, samples in self._samples.items():
                    used = _used(nvml, uuid)
                    if used is not None:
                        samples.append((time.monotonic(), used))
                self._over.wait(self._seconds)


def _used(nvml: Nvml, uuid: str) -> int | None:
    """Bytes in use on a GPU, without the driver's own reserve; None if it does not answer."""
    try:
        handle = nvml.query("nvmlDeviceGetHandleByUUID", uuid)
        info = nvml.memory(handle) if answered(handle) else handle
    except GpuLostError:
        return None
    return int(info.used) if answered(info) else None
