"""The driver's library: without a driver, without a GPU, and where it never answers."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import wait

import pytest

from tests.support.nvml import (
    Scenario,
    gpu_3090,
)
from tests.support.waiting import HANG
from turbofit.core.errors import MachineError, PackageError
from turbofit.machine import nvml, nvml_machine
from turbofit.machine.nvml import Nvml
from turbofit.machine.source import machine_from


def test_no_gpu_no_driver_and_no_pynvml(measured, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MachineError, match="sees no GPU"):
        measured(Scenario([]))
    with pytest.raises(MachineError, match="Driver Not Loaded") as caught:
        measured(None)
    assert "--on" in caught.value.hint
    assert caught.value.exit_code == 4
    with pytest.raises(MachineError, match="cannot be opened"):
        measured(Scenario([gpu_3090()], init_error=18))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(PackageError, match="nvidia-ml-py"):
        Nvml()


def test_a_driver_that_never_answers_keeps_no_plan_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    def hung() -> None:
        answers.wait(HANG)
        raise OSError

    monkeypatch.setattr(nvml_machine, "Nvml", hung)
    monkeypatch.setattr(nvml_machine, "_LONGEST", 0.01)
    with pytest.raises(MachineError, match="driver has not answered") as told:
        machine_from(None, environ={})
    answers.set()
    wait(nvml._hung, HANG)
    assert "dmesg" in (told.value.hint or "")
