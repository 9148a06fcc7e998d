"""A host with room, for each check."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from turbofit.core.machine import Host, Machine
from turbofit.core.units import GIB
from turbofit.diagnose.doctor import examine as examine_module


@pytest.fixture(autouse=True)
def roomy_host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The host's figures, which a test may change before it looks."""
    host: dict[str, Any] = {
        "ram_total": 64 * GIB, "ram_available": 48 * GIB, "shm_available": 32 * GIB, "cpus": 16,
    }  # fmt: skip
    real = examine_module.measure_in_time

    def measure(environ: Any) -> Machine:
        return msgspec.structs.replace(real(environ), host=Host(**host))

    monkeypatch.setattr(examine_module, "measure_in_time", measure)
    return host
