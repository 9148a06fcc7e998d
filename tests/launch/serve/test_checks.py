from __future__ import annotations

import resource
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.plans import plausible_plan
from turbofit.core.errors import DoesNotFitError, LaunchError
from turbofit.core.machine import Host
from turbofit.core.units import GIB, MIB
from turbofit.launch.serve.checks import check_before

ROOMY = Host(ram_total=64 * GIB, ram_available=60 * GIB, shm_available=32 * GIB, cpus=8)


def test_a_roomy_machine(tmp_path: Path, port: int) -> None:
    plan = plausible_plan()
    assert check_before(plan, ROOMY, tmp_path, [port], pretend=False) == []
    assert check_before(plan, Host(), tmp_path, [port], pretend=False) == []


def test_host_memory(tmp_path: Path) -> None:
    plan = plausible_plan()
    need = plan.host.pinned + plan.host.pageable
    poor = Host(ram_available=need - 1)
    with pytest.raises(DoesNotFitError, match="of host memory"):
        check_before(plan, poor, tmp_path, [], pretend=False)
    # Pretend engines need little, whatever the plan says.
    assert check_before(plan, Host(ram_available=GIB), tmp_path, [], pretend=True) == []
    with pytest.raises(DoesNotFitError, match="pretend engines"):
        check_before(plan, Host(ram_available=600 * MIB), tmp_path, [], pretend=True)


def test_a_port_that_somebody_has(tmp_path: Path, port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(LaunchError, match=f"port {port} cannot be used"):
            check_before(plausible_plan(), ROOMY, tmp_path, [port], pretend=False)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * MIB))
    with pytest.raises(LaunchError, match=r"10\.0 MiB left"):
        check_before(plausible_plan(), ROOMY, tmp_path, [], pretend=False)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: (GIB, GIB), resource.RLIMIT_NOFILE: (256, 512)}
    none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits.get(what, none))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: raised.append(to))
    with pytest.raises(LaunchError, match="address space"):
        check_before(plausible_plan(), ROOMY, tmp_path, [], pretend=False)
    (warning,) = check_before(plausible_plan(), ROOMY, tmp_path, [], pretend=True)
    assert "open files" in warning
    assert raised == [(512, 512)]


def test_little_shared_memory_is_a_warning(tmp_path: Path) -> None:
    plan = plausible_plan(gpus=2, tp=2)
    poor = Host(ram_available=60 * GIB, shm_available=60 * MIB)
    warnings = check_before(plan, poor, tmp_path, [], pretend=False)
    nccl = plan.settings.communicator == "nccl" and plan.settings.tp > 1
    assert bool(warnings) is nccl
    assert check_before(plan, poor, tmp_path, [], pretend=True) == []
