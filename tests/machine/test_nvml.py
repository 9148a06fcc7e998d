from __future__ import annotations

import builtins
import threading
from pathlib import Path

import pytest

from tests.support.nvml import UNKNOWN_ERROR, Scenario, four_3090, gpu_3090, in_process
from tests.support.waiting import HANG
from turbofit.core.errors import PackageError
from turbofit.core.struct import NA
from turbofit.machine import nvml
from turbofit.machine.nvml import GpuLostError, Nvml, ask_driver


def test_answers_and_na(nvml_library: Path, tmp_path: Path):
    with in_process(nvml_library, four_3090(), tmp_path), Nvml() as nvml:
        handle = nvml.query("nvmlDeviceGetHandleByIndex", 0)
        assert nvml.query("nvmlDeviceGetName", handle) == "NVIDIA GeForce RTX 3090"
        assert nvml.query("nvmlDeviceGetMigMode", handle) == NA
        assert nvml.query("nvmlDeviceNoSuchThing", handle) == NA
        assert nvml.query("nvmlDeviceGetTemperatureV", handle, 0) == NA
        assert nvml.query("nvmlDeviceGetHandleByIndex", 9) == NA
        assert "Invalid Argument" in nvml.reason("nvmlDeviceGetHandleByIndex", 9)
        assert nvml.max_nvlinks >= 18


def test_certain_absence_differs_from_no_answer(nvml_library: Path, tmp_path: Path):
    scenario = Scenario([gpu_3090(links=None), gpu_3090(1, error=UNKNOWN_ERROR)])
    with in_process(nvml_library, scenario, tmp_path), Nvml() as nvml:
        handles = [nvml.query("nvmlDeviceGetHandleByIndex", index) for index in range(2)]
        assert nvml.supported("nvmlDeviceGetNvLinkState", handles[0], 0) == (NA, True)
        assert nvml.supported("nvmlDeviceGetNvLinkState", handles[1], 0) == (NA, False)


def test_pynvml_missing(monkeypatch):
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PackageError, match="nvidia-ml-py"):
        Nvml()


def test_what_a_question_raises_is_raised_to_who_asked() -> None:
    def question() -> int:
        raise GpuLostError("gone")

    with pytest.raises(GpuLostError, match="gone"):
        ask_driver(question, 0)


def test_a_driver_that_hangs_is_asked_no_more_until_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvml, "_SECONDS", 0.01)
    answers, asking = threading.Event(), []

    def hung() -> int:
        asking.append(threading.current_thread())
        answers.wait(HANG)
        return 7

    assert [ask_driver(hung, 0), ask_driver(hung, 0)] == [0, 0]
    assert len(asking) == 1
    answers.set()
    asking[0].join(HANG)
    monkeypatch.setattr(nvml, "_SECONDS", HANG)
    assert ask_driver(hung, 0) == 7
