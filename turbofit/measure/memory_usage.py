"""Reads the bytes that a plan's GPUs have in use: by NVML, or of pretend GPUs.

Sizes are in bytes, times are those of `time.monotonic`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from typing_extensions import Self

from turbofit.core.errors import MachineError
from turbofit.core.plan import Plan
from turbofit.machine.nvml import GpuLostError, Nvml, answered
from turbofit.serving.engine.supervised_engine import SupervisedEngine

_SECONDS: Final = 0.01
#: Seconds to wait for a running query: a driver that lost a card may never answer.
_LAST_SECONDS: Final = 10.0
#: Seconds for which a card is sampled before a reading, whose last sample is then recent.
_SETTLE: Final = 0.3


class SampledRange(NamedTuple):
    """The largest and the last number of used bytes of one GPU over some time."""

    peak: int
    last: int


def used_now(gpu: int | str) -> int:
    """Return the bytes in use on a GPU, without the driver's own reserve.

    Args:
        gpu: NVML's index, or a UUID.

    Raises:
        MachineError: the memory cannot be read.
        PackageError: nvidia-ml-py is not installed.
    """
    with Nvml() as nvml:
        return _used(nvml, gpu)


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
        """Return the largest and last used bytes between two `time.monotonic` times.

        None if there is no sample.
        """
        inside = [used for at, used in self._samples[gpu] if begin <= at <= end]
        return SampledRange(peak=max(inside), last=inside[-1]) if inside else None

    def _run(self) -> None:
        with Nvml() as nvml:
            while not self._over.is_set():
                for gpu in self._gpus:
                    with suppress(MachineError):
                        used = _used(nvml, gpu)
                        self._samples[gpu].append((time.monotonic(), used))
                self._over.wait(self._seconds)


def _used(nvml: Nvml, gpu: int | str) -> int:
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
    return int(info.used)


class NvmlUsageReader:
    """Reads the bytes in use on each GPU of a plan, of all processes together.

    ``before``: bytes in use before the engines start, by the machine's index.

    Raises:
        MachineError: a GPU cannot be read.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self._uuids = plan, {gpu.index: gpu.uuid for gpu in plan.ledgers}
        self.before = {index: used_now(uuid) for index, uuid in self._uuids.items()}
        self._sampler = Sampler(list(self._uuids.values()))
        self._sampler.__enter__()
        self._since = dict.fromkeys(self._uuids, time.monotonic())

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """Return the highest use since this engine's last reading, and the use now, by GPU.

        Raises:
            MachineError: a GPU did not answer during the reading.
        """
        time.sleep(_SETTLE)
        now, spans = time.monotonic(), {}
        for index in self.plan.groups[engine.group]:
            uuid = self._uuids[index]
            span = self._sampler.between(uuid, self._since[index], now)
            if span is None or self._sampler.between(uuid, now - _SETTLE, now) is None:
                raise MachineError(
                    f"GPU {index} did not answer NVML", hint="turbofit doctor says more"
                )
            spans[index], self._since[index] = span, now
        return spans

    def end(self) -> None:
        self._sampler.__exit__()


class PretendUsageReader:
    """Reads the bytes that pretend GPUs hold.

    Their peaks cannot be reset, so a reading has a new peak only if it exceeds all earlier peaks.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.before = {gpu.index: gpu.used for gpu in plan.ledgers}
        self._highest: dict[int, int] = {}

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """Return the bytes in use on each pretend GPU: now, and at the peak since the last reading.

        If the highest peak has not risen since then, the bytes in use now count as the peak.

        Raises:
            MachineError: the account of the pretend GPUs cannot be read.
        """
        spans = {}
        for usage in engine.pretended.usages() if engine.pretended is not None else ():
            # Before the first reading the peak is that of loading.
            new, used = usage.peak > self._highest.get(usage.gpu, usage.peak), usage.in_use
            spans[usage.gpu] = SampledRange(peak=usage.peak if new else used, last=used)
            self._highest[usage.gpu] = usage.peak
        if not spans:
            raise MachineError("the pretend GPUs' account cannot be read", hint="see the log")
        return spans

    def end(self) -> None:
        """Do nothing; see `NvmlUsageReader`."""


GpuUsage = NvmlUsageReader | PretendUsageReader
