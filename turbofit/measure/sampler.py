"""Used memory of GPUs by NVML while a program runs on them: over time, and at most."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.errors import MachineError
from turbofit.machine.nvml import GpuLostError, Nvml, answered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

_SECONDS: Final = 0.01
#: Seconds to wait for a running query: a driver that lost a card may never answer.
_LAST_SECONDS: Final = 10.0


class Memory(NamedTuple):
    """Memory of one GPU in bytes, by NVML; ``used`` excludes the driver's own reserve."""

    total: int
    used: int
    free: int


class SampledRange(NamedTuple):
    """Used bytes of one GPU over some time: the largest and the last value."""

    peak: int
    last: int


def memory_now(gpu: int | str) -> Memory:
    """Read the memory of a GPU once.

    Args:
        gpu: NVML's index, or a UUID.

    Raises:
        MachineError: the memory cannot be read.
        PackageError: nvidia-ml-py is not installed.
    """
    with Nvml() as nvml:
        return _memory(nvml, gpu)


class Sampler:
    """Samples the used memory of GPUs every few milliseconds until closed; a context manager.

    It may miss a peak shorter than its interval. Allocators that keep their memory (TurboMind's
    pools, torch's segments) show their peak for long.

    Args:
        gpus: NVML's indices, or UUIDs.
        seconds: the interval between samples.
    """

    def __init__(self, gpus: Sequence[int | str], seconds: float = _SECONDS) -> None:
        self._gpus, self._seconds = tuple(gpus), seconds
        self._samples: dict[int | str, list[tuple[float, int]]] = {gpu: [] for gpu in self._gpus}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_LAST_SECONDS)

    def between(self, gpu: int | str, begin: float, end: float) -> SampledRange | None:
        """The largest and last bytes between two `time.monotonic` times; None without a sample."""
        inside = [used for at, used in self._samples[gpu] if begin <= at <= end]
        return SampledRange(peak=max(inside), last=inside[-1]) if inside else None

    def _run(self) -> None:
        with Nvml() as nvml:
            while not self._over.is_set():
                for gpu in self._gpus:
                    with suppress(MachineError):
                        used = _memory(nvml, gpu).used
                        self._samples[gpu].append((time.monotonic(), used))
                self._over.wait(self._seconds)


def _memory(nvml: Nvml, gpu: int | str) -> Memory:
    name = "nvmlDeviceGetHandleByUUID" if isinstance(gpu, str) else "nvmlDeviceGetHandleByIndex"
    try:
        handle = nvml.query(name, gpu)
        info = nvml.memory(handle) if answered(handle) else None
    except GpuLostError as exc:
        raise MachineError(f"GPU {gpu} is lost: {exc}", hint="check nvidia-smi") from None
    if info is None:
        raise MachineError(f"NVML knows no GPU {gpu}", hint="check nvidia-smi -L")
    if not answered(info):
        raise MachineError(f"the memory of GPU {gpu} cannot be read", hint="check nvidia-smi")
    return Memory(total=int(info.total), used=int(info.used), free=int(info.free))
