"""A machine as NVML's stand-in describes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.nvml import Scenario, in_process
from turbofit.core.machine import Machine
from turbofit.machine.source import machine_from


@pytest.fixture
def measured(nvml_library: Path, tmp_path: Path):
    def measured(scenario: Scenario | None, gpus: str | None = None, **environ: str) -> Machine:
        with in_process(nvml_library, scenario, tmp_path):
            return machine_from(None, gpus=gpus, environ=environ)

    return measured
