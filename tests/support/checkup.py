"""The stand-in NVML, a healthy environment to spoil, and a host with room, for each check."""

from __future__ import annotations

import itertools
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.nvml import (
    P2P_NVLINK,
    Scenario,
    gpu_h100,
    in_process,
)
from turbofit.core.errors import PackageError
from turbofit.core.machine import Host, Machine
from turbofit.core.units import GIB
from turbofit.machine import nvml_machine
from turbofit.machine.kernels.census import Census, released
from turbofit.planning.checks import DoctorReport, Finding, examine
from turbofit.planning.examine.scene import Sources

__all__ = ["Find", "Healthy", "Make"]


class Healthy(Sources):
    """An environment in order; a test spoils single attributes."""

    def __init__(self, root: Path, **environ: str) -> None:
        super().__init__({"HOME": "/users/one", **environ}, str(root))
        self.packages: dict[str, str] = {
            "lmdeploy": "0.18.0", "torch": "2.12.1", "transformers": "5.17.0", "triton": "3.7.0",
        }  # fmt: skip
        self.modules: set[str] = set()
        self.built: list[str] | None = ["sm_75", "sm_80", "sm_86", "sm_90", "compute_120"]
        self.disk: tuple[int, bool] | None = (500 * GIB, True)
        self.port: str | None = None
        self.library: PackageError | None = None
        self.census: Census | None = released((0, 18, 0))
        (root / "torch").mkdir(parents=True)
        (root / "torch/version.py").write_text("cuda: Optional[str] = '12.8'\n")

    def kernels(self) -> Census | None:
        return self.census

    def version(self, package: str) -> str | None:
        return self.packages.get(package)

    def image_library(self) -> Path:
        if self.library is not None:
            raise self.library
        return self.root / "libpixels.so"

    def has_module(self, name: str) -> bool:
        return name in self.modules

    def requires(self, package: str) -> list[str]:
        return ["torch<=2.12.1", "transformers!=5.0.*"] if package in self.packages else []

    def package_folder(self, package: str) -> Path | None:
        folder = self.root / package
        return folder if folder.is_dir() else None

    def torch_architectures(self) -> list[str] | None:
        return self.built

    def disk_free(self, path: str) -> tuple[int, bool] | None:
        return self.disk

    def port_problem(self, host: str, port: int) -> str | None:
        return self.port


@pytest.fixture
def sources(tmp_path: Path) -> Callable[..., Healthy]:
    made = itertools.count()

    def make(**environ: str) -> Healthy:
        return Healthy(tmp_path / f"root{next(made)}", **environ)

    return make


@pytest.fixture
def checkup(nvml_library: Path, tmp_path: Path) -> Callable[..., DoctorReport]:
    """Examine a scenario of GPUs with the real pynvml over the stand-in."""

    def run(scenario: Scenario | None, places: Sources, **options: Any) -> DoctorReport:
        with in_process(nvml_library, scenario, tmp_path):
            return examine(places, **options)

    return run


@pytest.fixture
def find(checkup: Callable[..., DoctorReport]) -> Callable[..., Finding]:
    """One finding of a checkup."""

    def run(check: str, scenario: Scenario | None, places: Sources, **options: Any) -> Finding:
        report = checkup(scenario, places, **options)
        found = [one for one in report.findings if one.check == check]
        assert len(found) == 1, (check, report.findings)
        return found[0]

    return run


def two(**changes: Any) -> Scenario:
    """Two server cards that reach each other over NVLink."""
    return Scenario([gpu_h100(0, **changes), gpu_h100(1, **changes)], p2p=P2P_NVLINK)


def remove(places: Healthy, folder: str) -> None:
    """A folder that the machine does not have."""
    shutil.rmtree(places.root / folder)


Make = Callable[..., Healthy]
Find = Callable[..., Finding]


@pytest.fixture(autouse=True)
def roomy_host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The host's figures, which a test may change before it looks."""
    host: dict[str, Any] = {
        "ram_total": 64 * GIB, "ram_available": 48 * GIB, "shm_available": 32 * GIB, "cpus": 16,
    }  # fmt: skip
    real = nvml_machine.measure_in_time

    def measure(environ: Any) -> Machine:
        return msgspec.structs.replace(real(environ), host=Host(**host))

    monkeypatch.setattr(nvml_machine, "measure_in_time", measure)
    return host


@pytest.fixture
def port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
        return free
