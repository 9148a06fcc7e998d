"""NVML over time on a machine that changes under it, and the account of pretend GPUs."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from msgspec.structs import replace

from tests.rehearsal.pretend.child import ask, make, tell
from tests.support.nvml import LOST, Gpu, Scenario, gpu_3090, in_process
from tests.support.plans import changed, plausible_plan
from tests.support.waiting import HANG, until
from turbofit import api
from turbofit.core.errors import MachineError
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.measure import memory_usage
from turbofit.measure.memory_usage import NvmlUsageReader, SampledRange, used_now
from turbofit.rehearsal.planned import charged
from turbofit.rehearsal.pretend.build import build
from turbofit.serving.engine.pretend_launch import PretendReader

PLAN = api.plan("internvl2-8b", on="1xrtx3090", engine="turbomind")


def plan_of(*gpus: Gpu) -> Plan:
    """A plan for these GPUs of a stand-in machine, all in one group."""
    plan = plausible_plan(gpus=len(gpus), tp=len(gpus))
    ledgers = (replace(one, uuid=gpu.uuid) for one, gpu in zip(plan.ledgers, gpus, strict=True))
    return changed(plan, ledgers=tuple(ledgers))


def test_peaks_and_last_values_between_two_times(nvml_library: Path, tmp_path: Path) -> None:
    scenario = Scenario([gpu_3090(used=100 * MIB), gpu_3090(1, used=5 * MIB)])
    with in_process(nvml_library, scenario, tmp_path) as path:
        usage = NvmlUsageReader(plan_of(*scenario.gpus), seconds=0.001)
        assert usage.before == {0: 100 * MIB, 1: 5 * MIB}
        begun = time.monotonic()

        def shown(used: int) -> bool:
            span = usage.between(0, begun, time.monotonic())
            return span is not None and span.last == used * MIB

        until(lambda: shown(100), "a first sample")
        for used in (900, 300):
            scenario.gpus[0].used = used * MIB
            scenario.write(path)
            until(lambda: shown(used), f"{used} MiB to be sampled")  # noqa: B023
        now = time.monotonic()
        usage.end()
        assert usage.between(0, begun, now) == SampledRange(peak=900 * MIB, last=300 * MIB)
        assert usage.between(1, begun, now) == SampledRange(peak=5 * MIB, last=5 * MIB)
        assert usage.between(0, now + 1, now + 2) is None


def test_a_gpu_that_cannot_be_read_is_said_and_the_others_are_sampled(
    nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = Scenario([gpu_3090(), gpu_3090(1, used=5 * MIB)])
    with in_process(nvml_library, scenario, tmp_path) as path:
        with pytest.raises(MachineError, match="no GPU GPU-of-nobody"):
            used_now("GPU-of-nobody")
        usage = NvmlUsageReader(plan_of(*scenario.gpus), seconds=0.001)
        scenario.gpus[0].error = LOST
        scenario.write(path)
        with pytest.raises(MachineError, match="is lost"):
            used_now(scenario.gpus[0].uuid)
        begun = time.monotonic()
        until(lambda: usage.between(1, begun, time.monotonic()) is not None, "a sample")
        usage.end()
        assert usage.between(0, begun, time.monotonic()) is None

        def lost(_: str) -> None:  # as NVML documents it
            raise pynvml.NVMLError(LOST)

        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lost)
        with pytest.raises(MachineError, match="is lost"):
            used_now(scenario.gpus[1].uuid)


def test_a_driver_that_never_answers_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    def silent(*_: object) -> None:
        asked.set()
        answers.wait()
        raise MachineError("it is lost", hint="none")

    monkeypatch.setattr(memory_usage, "Nvml", nullcontext)
    monkeypatch.setattr(memory_usage, "used_now", lambda _: MIB)
    monkeypatch.setattr(memory_usage, "_used", silent)
    monkeypatch.setattr(memory_usage, "_LAST_SECONDS", 0.0)
    try:
        usage = NvmlUsageReader(PLAN)
        assert asked.wait(HANG)
        usage.end()
        assert not answers.is_set()
    finally:
        answers.set()


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_each_reading_is_of_the_start_that_runs(tmp_path: Path) -> None:
    machine = make(build(), tmp_path, charged(PLAN, 0))
    engine: Any = SimpleNamespace(group=0, pretended=PretendReader(PLAN, 0, tmp_path))
    usage = memory_usage.PretendUsageReader(PLAN)
    before = charged(PLAN, 0).gpus[0].used
    (nothing,) = usage.read(engine).values()
    assert (nothing.peak, nothing.last) == (before, before)
    process = machine.start(
        "rt.cudaFree(malloc(50)); malloc(2); say(); wait();"
        "rt.cudaFree(malloc(80)); say(); wait(); os._exit(0)"
    )
    before += charged(PLAN, 0).context
    for peak in (50, 82):
        ask(process)
        (read,) = usage.read(engine).values()
        assert (read.peak, read.last) == (before + peak * MIB, before + 2 * MIB)
        tell(process)
    process.wait(timeout=HANG)
    # A new start has an account of its own.
    engine.pretended = PretendReader(PLAN, 0, tmp_path / "another")
    (read,) = usage.read(engine).values()
    assert read.peak == nothing.peak
    (tmp_path / "shared").write_bytes(b"of another version" * 1000)
    engine.pretended = PretendReader(PLAN, 0, tmp_path)
    with pytest.raises(MachineError, match="account cannot be read"):
        usage.read(engine)


def test_a_gpu_that_answers_no_more_is_not_read_by_its_last_answer(monkeypatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 10.0, sleep=lambda _: None)
    monkeypatch.setattr(memory_usage, "time", clock)
    monkeypatch.setattr(memory_usage, "used_now", lambda _: MIB)
    monkeypatch.setattr(NvmlUsageReader, "_sample", lambda *_: None)
    engine: Any = SimpleNamespace(group=0)
    for last, refused in ((9.9, False), (9.0, True)):
        usage = NvmlUsageReader(PLAN)
        usage._since, usage._samples = {0: 0.0}, {0: [(1.0, MIB), (last, MIB)]}
        if refused:
            with pytest.raises(MachineError, match="did not answer"):
                usage.read(engine)
        else:
            assert usage.read(engine) == {0: SampledRange(peak=MIB, last=MIB)}
