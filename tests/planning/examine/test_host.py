"""Checks of the host: memory, disk, port, limits, variables."""

from __future__ import annotations

import resource
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.checkup import Find, Make, card, two
from tests.support.nvml import Scenario
from tests.support.plans import plausible_plan
from turbofit.core.errors import DoesNotFitError, LaunchError
from turbofit.core.machine import Host
from turbofit.core.plan import Plan
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB
from turbofit.planning.checks import plan_warnings, refuse
from turbofit.planning.examine.scene import Scene, Sources


@pytest.mark.parametrize(
    ("available", "state"),
    [(48 * GIB, "ok"), (6 * GIB, "warning"), (2 * GIB, "stops"), (NA, "unreadable")],
)
def test_host_memory(
    find: Find, sources: Make, roomy_host: dict[str, Any], available: Any, state: str
) -> None:
    roomy_host["ram_available"] = available
    assert find("host_memory", two(), sources()).state == state


@pytest.mark.parametrize(
    ("available", "alone", "state"),
    [
        (64 * MIB, False, "stops"), (600 * MIB, False, "warning"), (4 * GIB, False, "ok"),
        (64 * MIB, True, "ok"), (NA, False, "unreadable"),
    ],
)  # fmt: skip
def test_shared_memory(
    find: Find, sources: Make, roomy_host: dict[str, Any], available: Any, alone: bool, state: str
) -> None:
    roomy_host["shm_available"] = available
    scenario = Scenario([card(0)] if alone else [card(0), card(1)])
    assert find("shared_memory", scenario, sources()).state == state


def test_locked_memory(find: Find, sources: Make) -> None:
    places = sources()
    places.locked = 64 * 1024
    assert find("locked_memory", two(), places).state == "ok"
    (places.root / "sys/class/infiniband/mlx5_0").mkdir()
    found = find("locked_memory", two(), places)
    assert found.state == "warning"
    assert "mlx5_0" in found.seen
    places.locked = NA
    assert find("locked_memory", two(), places).state == "unreadable"


def test_disk(find: Find, sources: Make) -> None:
    places = sources(HF_HOME="/data/hub")
    places.disk = (5 * GIB, True)
    found = find("disk", two(), places)
    assert found.state == "warning"
    assert "/data/hub" in found.seen
    places.disk = (500 * GIB, False)
    assert find("disk", two(), places).state == "warning"
    places.disk = None
    assert find("disk", two(), places).state == "unreadable"


@pytest.mark.parametrize(
    ("environ", "cache"),
    [
        ({"HUGGINGFACE_HUB_CACHE": "/big/hub", "HF_HOME": "/small"}, "/big/hub"),
        ({"HF_HOME": "/big"}, "/big/hub"),
        ({"XDG_CACHE_HOME": "/big"}, "/big/huggingface/hub"),
    ],
)
def test_the_disk_is_that_of_the_hubs_cache(
    find: Find, sources: Make, environ: dict[str, str], cache: str
) -> None:
    places = sources(**environ)
    places.disk = (5 * GIB, True)
    assert find("disk", two(), places).seen.startswith(f"{cache}: 5.0 GiB free")


def test_port(find: Find, sources: Make) -> None:
    places = sources()
    places.port = "port 23333 cannot be used: Address already in use"
    found = find("port", two(), places)
    assert found.state == "stops"
    assert "23333" in found.fix
    places.port = "port 80 cannot be used: Permission denied"
    assert find("port", two(), places, port=80).state == "unreadable"


def test_a_real_port_that_is_taken() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        problem = Sources({}).port_problem("127.0.0.1", taken.getsockname()[1])
    assert problem is not None
    assert "in use" in problem


def test_rank_launcher(find: Find, sources: Make) -> None:
    found = find("rank_launcher", two(), sources(WORLD_SIZE="4", LOCAL_RANK="0"))
    assert found.state == "stops"
    assert "WORLD_SIZE=4" in found.seen
    alone = Scenario([card(0)])
    assert find("rank_launcher", alone, sources(WORLD_SIZE="4")).state == "ok"


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUDA_LAUNCH_BLOCKING", "1"), ("CUDA_MODULE_LOADING", "EAGER"), ("TM_LOG_LEVEL", "DEBUG"),
     ("LD_PRELOAD", "/x/libturbofit_pretend.so")],
)  # fmt: skip
def test_variables(find: Find, sources: Make, name: str, value: str) -> None:
    found = find("environment", two(), sources(**{name: value}))
    assert found.state == "warning"


ROOMY = Host(ram_total=64 * GIB, ram_available=60 * GIB, shm_available=32 * GIB, cpus=8)


def check_before(
    plan: Plan, host: Host, folder: Path, ports: Sequence[int], *, pretend: bool
) -> list[str]:
    return refuse(
        Scene(
            Sources(), "start", host=host, plan=plan, folder=folder, ports=ports, pretend=pretend
        )
    )  # fmt: skip


def test_host_memory_of_a_plan(tmp_path: Path) -> None:
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
    monkeypatch.setattr(Sources, "disk_free", lambda *_: (10 * MIB, True))
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


@pytest.mark.parametrize(
    ("tp", "environ", "warned"),
    [
        (4, {"WORLD_SIZE": "4"}, "4 whole engines"),
        (2, {"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
        (4, {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "WORLD_SIZE=4"),
        (4, {"WORLD_SIZE": "1"}, None),
        (1, {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, None),
        (4, {}, None),
        (4, {"WORLD_SIZE": "x"}, None),
    ],
)
def test_rank_launchers(tp: int, environ: dict[str, str], warned: str | None) -> None:
    plan = plausible_plan()
    plan = replace(plan, parallel=replace(plan.parallel, tp=tp))
    warnings = plan_warnings(plan, Sources(environ))
    assert len(warnings) == (warned is not None)
    if warned is not None:
        assert warned in warnings[0]
        with pytest.raises(LaunchError, match="start it once"):
            refuse(Scene(Sources(environ), "launch", plan=plan))
