"""NVML over time, on a machine that changes under it."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pynvml
import pytest

from tests.support.nvml import LOST, Scenario, gpu_3090, in_process
from tests.support.waiting import HANG, until
from turbofit.core.errors import MachineError
from turbofit.core.units import MIB
from turbofit.measure import calibrate
from turbofit.measure.calibrate import Memory, SampledRange, Sampler, memory_now


def test_peaks_and_last_values_between_two_times(nvml_library: Path, tmp_path: Path) -> None:
    scenario = Scenario([gpu_3090(used=100 * MIB), gpu_3090(1, used=5 * MIB)])
    with in_process(nvml_library, scenario, tmp_path) as path:
        uuid = scenario.gpus[1].uuid
        with Sampler([0, uuid], seconds=0.001) as sampler:
            begun = time.monotonic()

            def shown(used: int) -> bool:
                span = sampler.between(0, begun, time.monotonic())
                return span is not None and span.last == used * MIB

            until(lambda: shown(100), "a first sample")
            for used in (900, 300):
                scenario.gpus[0].used = used * MIB
                scenario.write(path)
                until(lambda: shown(used), f"{used} MiB to be sampled")  # noqa: B023
            now = time.monotonic()
        assert sampler.between(0, begun, now) == SampledRange(peak=900 * MIB, last=300 * MIB)
        assert sampler.between(uuid, begun, now) == SampledRange(peak=5 * MIB, last=5 * MIB)
        assert sampler.between(0, now + 1, now + 2) is None
        card = gpu_3090()
        assert memory_now(0) == Memory(
            total=24576 * MIB, used=300 * MIB, free=24576 * MIB - card.reserved - 300 * MIB
        )


def test_a_gpu_that_cannot_be_read_is_said_and_the_others_are_sampled(
    nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: str) -> None:  # as NVML documents it
        raise pynvml.NVMLError(LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lost)
    scenario = Scenario([gpu_3090(no_handle=LOST), gpu_3090(1, used=5 * MIB)])
    with in_process(nvml_library, scenario, tmp_path) as path:
        with pytest.raises(MachineError, match="no GPU 7"):
            memory_now(7)
        for gpu in (0, scenario.gpus[0].uuid):
            with pytest.raises(MachineError, match="is lost"):
                memory_now(gpu)
        begun = time.monotonic()
        with Sampler([0, 1], seconds=0.001) as sampler:
            until(lambda: sampler.between(1, begun, time.monotonic()) is not None, "a sample")
        assert sampler.between(0, begun, time.monotonic()) is None
        scenario.gpus[1].error = LOST
        scenario.write(path)
        with pytest.raises(MachineError):
            memory_now(1)


def test_a_driver_that_never_answers_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    def silent(*_: object) -> None:
        asked.set()
        answers.wait()
        raise MachineError("it is lost", hint="none")

    monkeypatch.setattr(calibrate, "Nvml", nullcontext)
    monkeypatch.setattr(calibrate, "_memory", silent)
    monkeypatch.setattr(calibrate, "_LAST_SECONDS", 0.0)
    try:
        with Sampler([0]):
            assert asked.wait(HANG)
        assert not answers.is_set()
    finally:
        answers.set()
