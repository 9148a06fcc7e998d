"""Checks of the host: memory, disk, port, limits, variables."""

from __future__ import annotations

from typing import Any

import pytest

from tests.diagnose.conftest import card
from tests.diagnose.doctor.support import Find, Make, two
from tests.nvml.standin import Scenario
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB
from turbofit.diagnose.doctor.sources import Sources


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
