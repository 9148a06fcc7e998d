"""Reads the bytes in use on a plan's GPUs: by NVML, or by the account of pretend GPUs.

Sizes are in bytes, times are those of `time.monotonic`.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Final, NamedTuple

from turbofit.core.errors import MachineError
from turbofit.core.plan import Plan
from turbofit.machine.nvml import GpuLostError, Nvml, answered
from turbofit.serving.engine.supervised_engine import SupervisedEngine

_SECONDS: Final = 0.01
#: Seconds to wait for the last query: a driver that lost a card may never answer.
_LAST_SECONDS: Final = 10.0
#: Seconds of samples right before a reading, so that the reading's last sample is recent.
_SETTLE: Final = 0.3


class SampledRange(NamedTuple):
    """The largest and the last number of used bytes of one GPU over some time."""

    peak: int
    last: int


def used_now(uuid: str) -> int:
    """Return the bytes in use on a GPU, without the driver's own reserve.

    Raises:
        MachineError: the memory cannot be read.
        PackageError: nvidia-ml-py is not installed.
    """
    with Nvml() as nvml:
        return _used(nvml, uuid)


def _used(nvml: Nvml, uuid: str) -> int:
    try:
        handle = nvml.query("nvmlDeviceGetHandleByUUID", uuid)
        info = nvml.memory(handle) if answered(handle) else None
    except GpuLostError as exc:
        raise MachineError(f"GPU {uuid} is lost: {exc}", hint="check nvidia-smi") from None
    if info is None:
        raise MachineError(f"NVML knows no GPU {uuid}", hint="check nvidia-smi -L")
    if not answered(info):
        raise MachineError(f"the memory of GPU {uuid} cannot be read", hint="check nvidia-smi")
    return int(info.used)


class NvmlUsageReader:
    """Samples the bytes in use on each GPU of a plan, of all processes together, until `end`.

    A peak shorter than ``seconds``, the interval between samples, may be missed. Allocators that
    keep their memory (TurboMind's pools, torch's segments) show their peak for long. ``before``:
    bytes in use before the engines start, by the machine's index.

    Raises:
        MachineError: a GPU cannot be read.
    """

    def __init__(self, plan: Plan, seconds: float = _SECONDS) -> None:
        self.plan, self._uuids = plan, {gpu.index: gpu.uuid for gpu in plan.ledgers}
        self.before = {index: used_now(uuid) for index, uuid in self._uuids.items()}
        #: By the machine's index: times of `time.monotonic`, each with the bytes in use.
        self._samples: dict[int, list[tuple[float, int]]] = {index: [] for index in self._uuids}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(seconds,), daemon=True)
        self._thread.start()
        self._since = dict.fromkeys(self._uuids, time.monotonic())

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """Return the highest use since the engine's last reading, and the present use, by GPU.

        Raises:
            MachineError: a GPU did not answer during the reading.
        """
        time.sleep(_SETTLE)
        now, spans = time.monotonic(), {}
        for index in self.plan.groups[engine.group]:
            span = self.between(index, self._since[index], now)
            if span is None or self.between(index, now - _SETTLE, now) is None:
                raise MachineError(
                    f"GPU {index} did not answer NVML", hint="turbofit doctor says more"
                )
            spans[index], self._since[index] = span, now
        return spans

    def between(self, index: int, begin: float, end: float) -> SampledRange | None:
        """Return a GPU's largest and last used bytes between two `time.monotonic` times.

        None if there is no sample.
        """
        inside = [used for at, used in self._samples[index] if begin <= at <= end]
        return SampledRange(peak=max(inside), last=inside[-1]) if inside else None

    def end(self) -> None:
        self._over.set()
        self._thread.join(_LAST_SECONDS)

    def _sample(self, seconds: float) -> None:
        with Nvml() as nvml:
            while not self._over.is_set():
                for index, uuid in self._uuids.items():
                    with suppress(MachineError):
                        used = _used(nvml, uuid)
                        self._samples[index].append((time.monotonic(), used))
                self._over.wait(seconds)


class PretendUsageReader:
    """Reads the bytes that pretend GPUs hold.

    A pretend GPU's peak cannot be reset: a reading has a new peak only above all earlier peaks.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.before = {gpu.index: gpu.used for gpu in plan.ledgers}
        self._highest: dict[int, int] = {}

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """Return the bytes in use on each pretend GPU: now, and at the peak since the last reading.

        If the highest peak has not risen since the last reading, the present use is the peak.

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
