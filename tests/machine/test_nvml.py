from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from tests.support.nvml import LOST, UNKNOWN_ERROR, Scenario, four_3090, gpu_3090, in_process
from turbofit.core.errors import MachineError, PackageError
from turbofit.core.struct import NA
from turbofit.core.units import MIB
from turbofit.machine.nvml import GpuLostError, Nvml


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


def test_memory_versions(nvml_library: Path, tmp_path: Path):
    scenario = Scenario([gpu_3090(used=100 * MIB)])
    with in_process(nvml_library, scenario, tmp_path) as path, Nvml() as nvml:
        handle = nvml.query("nvmlDeviceGetHandleByIndex", 0)
        info, version_2 = nvml.memory(handle)
        assert (info.used, info.reserved, version_2) == (100 * MIB, 308 * MIB, True)
        scenario.memory_v1 = True
        scenario.write(path)
        info, version_2 = nvml.memory(handle)
        assert (info.used, version_2) == (408 * MIB, False)


def test_a_lost_gpu_raises(nvml_library: Path, tmp_path: Path):
    with (
        in_process(nvml_library, Scenario([gpu_3090(error=LOST)]), tmp_path),
        Nvml() as nvml,
    ):
        handle = nvml.query("nvmlDeviceGetHandleByIndex", 0)
        with pytest.raises(GpuLostError, match="lost"):
            nvml.memory(handle)


def test_driver_not_loaded(nvml_library: Path, tmp_path: Path):
    with (
        in_process(nvml_library, None, tmp_path),
        pytest.raises(MachineError, match="Driver Not Loaded") as caught,
    ):
        Nvml()
    assert "--on" in caught.value.hint
    assert caught.value.exit_code == 4


def test_pynvml_missing(monkeypatch):
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PackageError, match="nvidia-ml-py"):
        Nvml()
