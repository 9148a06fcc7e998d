"""Checks of the host: memory, disk, port, limits, variables."""

from __future__ import annotations

import resource
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from msgspec.structs import replace

from tests.support.checkup import Find, Make, two
from tests.support.nvml import Scenario, gpu_3090
from tests.support.plans import plausible_plan
from turbofit.core.errors import DoesNotFitError, LaunchError
from turbofit.core.machine import Host
from turbofit.core.plan import Plan
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB
from turbofit.planning.checks import examine, plan_warnings, refuse
from turbofit.planning.examine.scene import Scene, Sources


@pytest.mark.parametrize(
    ("check", "available", "state"),
    [
        ("host_memory", 48 * GIB, "ok"),
        ("host_memory", 2 * GIB, "stops"),
        ("host_memory", NA, "unreadable"),
        ("shared_memory", 4 * GIB, "ok"),
        ("shared_memory", 256 * MIB, "ok"),
        ("shared_memory", 256 * MIB - 1, "warning"),
        ("shared_memory", 64 * MIB, "warning"),
        ("shared_memory", NA, "unreadable"),
    ],
)
def test_memory(
    find: Find, sources: Make, roomy_host: dict[str, Any], check: str, available: Any, state: str
) -> None:
    roomy_host["ram_available" if check == "host_memory" else "shm_available"] = available
    assert find(check, Scenario([gpu_3090(0), gpu_3090(1)]), sources()).state == state


FULL = {"disk": (5 * GIB, True)}
USED = "port 23333 cannot be used: {}"


def test_what_one_card_does_not_need(find: Find, sources: Make, roomy_host: dict[str, Any]) -> None:
    roomy_host["shm_available"] = 64 * MIB
    for check in ("shared_memory", "rank_launcher"):
        assert find(check, Scenario([gpu_3090(0)]), sources(WORLD_SIZE="4")).state == "ok"


@pytest.mark.parametrize(
    ("check", "state", "environ", "changes", "words"),
    [
        ("disk", "warning", {"HF_HOME": "/data"}, FULL, "/data/hub: 5.0 GiB free"),
        ("disk", "warning", {"HUGGINGFACE_HUB_CACHE": "/big/hub", "HF_HOME": "/small"}, FULL,
         "/big/hub: 5.0 GiB free"),
        ("disk", "warning", {"XDG_CACHE_HOME": "/big"}, FULL, "/big/huggingface/hub"),
        ("disk", "warning", {}, {"disk": (500 * GIB, False)}, "not writable"),
        ("disk", "unreadable", {}, {"disk": None}, ""),
        ("port", "stops", {}, {"port": USED.format("Address already in use")}, "23333"),
        ("port", "unreadable", {}, {"port": USED.format("Permission denied")}, ""),
        ("rank_launcher", "stops", {"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, {}, "WORLD_SIZE=4"),
    ],
)  # fmt: skip
def test_conditions(
    find: Find, sources: Make, check: str, state: str, environ: dict[str, str], changes: Any,
    words: str,
) -> None:  # fmt: skip
    places = sources(**environ)
    vars(places).update(changes)
    found = find(check, two(), places)
    assert (found.state, words in found.seen) == (state, True)


ROOMY = Host(ram_total=64 * GIB, ram_available=60 * GIB, shm_available=32 * GIB, cpus=8)


def check_before(
    host: Host, folder: Path, *ports: int, pretend: bool = False, plan: Plan | None = None
) -> list[str]:
    plan = plan or plausible_plan()
    return refuse(
        Scene(Sources(), "start", host=host, plan=plan, folder=folder, ports=ports, pretend=pretend)
    )


def test_host_memory_of_a_plan(tmp_path: Path) -> None:
    plan = plausible_plan()
    poor = Host(ram_available=plan.host.pinned + plan.host.pageable - 1)
    with pytest.raises(DoesNotFitError, match="of host memory"):
        check_before(poor, tmp_path)
    # Pretend engines need little, whatever the plan says.
    assert check_before(Host(ram_available=GIB), tmp_path, pretend=True) == []
    with pytest.raises(DoesNotFitError, match="pretend engines"):
        check_before(Host(ram_available=600 * MIB), tmp_path, pretend=True)


def test_a_port_that_somebody_has_and_a_full_disk(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(LaunchError, match=f"port {port} cannot be used"):
            check_before(ROOMY, tmp_path, port)
    monkeypatch.setattr(Sources, "disk_free", lambda *_: (10 * MIB, True))
    with pytest.raises(LaunchError, match=r"10\.0 MiB left"):
        check_before(ROOMY, tmp_path)


def test_a_port_that_a_server_of_ours_has_is_told_with_its_run(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        ours = "it is a server of turbofit: turbofit stop a-run"
        for server, fix in (("a-run", ours), ("", "end it (ss")):
            report = examine(on="1xrtx3090", port=port, server=server)
            (found,) = [one for one in report.findings if one.check == "port"]
            assert found.fix.startswith(fix)
            assert found.fix.endswith(", or choose another --port")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setrlimit = Mock()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    (warning,) = check_before(ROOMY, tmp_path)
    assert "open files" in warning
    setrlimit.assert_called_with(resource.RLIMIT_NOFILE, (512, 512))


def test_little_shared_memory_is_a_warning(tmp_path: Path) -> None:
    plan = plausible_plan(gpus=2, tp=2)
    poor = replace(ROOMY, shm_available=60 * MIB)
    assert plan.engines[0].settings.communicator == "nccl"
    assert check_before(poor, tmp_path, plan=plan)
    assert check_before(poor, tmp_path, plan=plan, pretend=True) == []


@pytest.mark.parametrize(
    ("tp", "environ", "warned"),
    [
        (4, {"WORLD_SIZE": "4"}, "4 whole engines"),
        (2, {"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
        (4, {"WORLD_SIZE": "1"}, None),
        (1, {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, None),
        (4, {"WORLD_SIZE": "x"}, None),
    ],
)
def test_rank_launchers(tp: int, environ: dict[str, str], warned: str | None) -> None:
    plan = plausible_plan(gpus=4, tp=tp)
    warnings = plan_warnings(plan, Sources(environ))
    assert len(warnings) == (warned is not None)
    if warned is not None:
        assert warned in warnings[0]
        with pytest.raises(LaunchError, match="start turbofit once"):
            refuse(Scene(Sources(environ), "launch", plan=plan))
