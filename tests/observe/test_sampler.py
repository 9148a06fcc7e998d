"""NVML over time, on a machine that changes under it."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.nvml import LOST, Scenario, gpu_3090, in_process
from tests.support.waiting import HANG, until
from turbofit.core.units import MIB
from turbofit.observe import sampler
from turbofit.observe.sampler import SampledRange, Sampler


def test_peaks_and_last_values_between_two_times(nvml_library: Path, tmp_path: Path) -> None:
    scenario = Scenario([gpu_3090(used=100 * MIB), gpu_3090(1, used=5 * MIB)])
    with in_process(nvml_library, scenario, tmp_path) as path:
        grows, still = (gpu.uuid for gpu in scenario.gpus)
        with Sampler([grows, still], seconds=0.001) as sampler:
            begun = time.monotonic()

            def shown(used: int) -> bool:
                span = sampler.between(grows, begun, time.monotonic())
                return span is not None and span.last == used * MIB

            until(lambda: shown(100), "a first sample")
            for used in (900, 300):
                scenario.gpus[0].used = used * MIB
                scenario.write(path)
                until(lambda: shown(used), f"{used} MiB to be sampled")  # noqa: B023
            now = time.monotonic()
        assert sampler.between(grows, begun, now) == SampledRange(peak=900 * MIB, last=300 * MIB)
        assert sampler.between(still, begun, now) == SampledRange(peak=5 * MIB, last=5 * MIB)
        assert sampler.between(grows, now + 1, now + 2) is None


def test_a_gpu_that_cannot_be_read_has_no_sample_and_the_others_have(
    nvml_library: Path, tmp_path: Path
) -> None:
    gone, here = gpu_3090(error=LOST), gpu_3090(1, used=5 * MIB)
    with in_process(nvml_library, Scenario([gone, here]), tmp_path):
        begun = time.monotonic()
        with Sampler([gone.uuid, here.uuid, "GPU-no-such"], seconds=0.001) as sampler:
            until(lambda: sampler.between(here.uuid, begun, time.monotonic()), "a sample")
        for uuid in (gone.uuid, "GPU-no-such"):
            assert sampler.between(uuid, begun, time.monotonic()) is None


def test_a_driver_that_never_answers_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    def silent(*_: object) -> None:
        asked.set()
        answers.wait()

    monkeypatch.setattr(sampler, "Nvml", nullcontext)
    monkeypatch.setattr(sampler, "_used", silent)
    monkeypatch.setattr(sampler, "_LAST_SECONDS", 0.0)
    try:
        with Sampler(["GPU-x"]):
            assert asked.wait(HANG)
        assert not answers.is_set()
    finally:
        answers.set()
