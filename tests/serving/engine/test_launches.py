"""An engine's process: its environment, its command line, and what the kernel tells of it."""

from __future__ import annotations

import importlib.metadata
import socket
import subprocess
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.plans import changed, plausible_plan
from turbofit.cli.main import main
from turbofit.core.errors import LaunchError, PackageError
from turbofit.core.installation import install_command, without_gpu
from turbofit.core.plan import Command, Plan
from turbofit.core.units import GIB, MIB
from turbofit.planning.commands import private_commands
from turbofit.serving.engine import launches, process
from turbofit.serving.engine.launches import KEY, Launch


def test_kills_are_the_groups_own_else_the_machines(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"

    def kills() -> int | None:
        return process.host_kills(proc=str(proc), cgroup=str(cgroup))

    (proc / "self").mkdir(parents=True)
    (cgroup / "user" / "me").mkdir(parents=True)
    assert kills() is None
    (proc / "vmstat").write_text("nr_free_pages 3\noom_kill 7\n")
    assert kills() == 7
    (proc / "self" / "cgroup").write_text("0::/\n")
    (cgroup / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert kills() == 2
    (proc / "self" / "cgroup").write_text("0::/user/me\n")
    (cgroup / "user" / "me" / "memory.events").write_text("oom_kill 1\noom_group_kill 0\n")
    assert kills() == 1
    assert process.host_kills() is None or process.host_kills() >= 0  # this machine's


@pytest.mark.parametrize(
    ("version", "refused", "warned"),
    [("0.15.2", True, False), ("0.16.0", False, True), ("0.18.0", False, False),
     ("0.19.0rc1", False, True), ("1.0", False, True)],
)  # fmt: skip
def test_versions(version: str, refused: bool, warned: bool, monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    if refused:
        with pytest.raises(PackageError, match="older"):
            launches.find_lmdeploy()
    else:
        assert (launches.find_lmdeploy().warning is not None) == warned


def test_without_lmdeploy_the_install_command_is_told(monkeypatch, capsys) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lmdeploy":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["serve", "internvl2-1b", "--pretend", "--on", "1xrtx3060"]) == 7
    hint = f"hint: install it with {install_command('lmdeploy')}, or turbofit where LMDeploy is"
    assert without_gpu().startswith("; for pretend GPUs alone ")  # of a clone
    assert f"{hint}{without_gpu()}\n" in capsys.readouterr().err


def run_module(folder: Path, name: str, code: str, **environ: str) -> list[str]:
    """What a module says, as LMDeploy's is run."""
    (folder / f"{name}.py").write_text(code)
    command = Command(env=environ, argv=("lmdeploy", "serve", "--server-port", "7"))
    start = Launch(command, launches.module_runner(name), "secret").start_command(0)
    assert "secret" not in " ".join(start.argv)
    done = subprocess.run(
        start.argv, env={**start.env, "PYTHONPATH": str(folder)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_what_an_engine_sees(tmp_path: Path) -> None:
    """Its key, which stands in no command line and is not handed on to what the engine starts."""
    code = "import os, sys\nprint(*sys.argv[1:], os.getenv('TURBOFIT_ENGINE_KEY'), os.getenv('A'))"
    (words,) = run_module(tmp_path, "dumps", code, A="1")
    assert words == "serve --server-port 7 --api-keys secret None 1"
    # One of the user's own is on the command line already.
    command = Command(env={}, argv=("lmdeploy", "--api-keys", "mine"))
    assert KEY not in Launch(command, launches.module_runner("x"), "mine").start_command(0).env
    # A script's folder comes first on its path; ours has a module named like many others.
    path = run_module(tmp_path, "looks", "import sys\nprint('\\n'.join(sys.path))\n")
    assert not any(folder.endswith("turbofit/serving") for folder in path)


def test_ranks_start_a_ray_of_their_own_unless_somebody_names_one() -> None:
    """LMDeploy's would join a cluster that runs on the host, and take GPUs that no plan names."""
    launch = Launch(Command(env={}, argv=("lmdeploy",)), ())
    assert launch.environment({})["RAY_ADDRESS"] == "local"
    named = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert launch.environment(named)["RAY_ADDRESS"] == named["RAY_ADDRESS"]


def test_an_engine_keeps_no_urls(tmp_path: Path) -> None:
    """LMDeploy parses each image's data: URL, and Python kept the last 128 of them twice."""
    code = (
        "from urllib.parse import urlparse, urlsplit\n"
        "print(urlparse('data:image/png;base64,AAAA').path)\n"
        "print(urlsplit.cache_info().currsize)\n"
    )
    assert run_module(tmp_path, "parses", code) == ["image/png;base64,AAAA", "0"]


def test_private_commands_are_closed() -> None:
    plan = plausible_plan(gpus=2, tp=1)
    commands = private_commands(plan, [5001, 5002], "/overlay/InternVL2-8B", "org/name")
    assert [launches.port_of(command) for command in commands] == [5001, 5002]
    argv = commands[0].argv
    assert argv[3] == "/overlay/InternVL2-8B"
    values = dict(pairwise(argv))
    assert values["--model-name"] == "org/name"
    assert values["--server-name"] == "127.0.0.1"
    assert "--disable-fastapi-docs" in argv
    assert values["--allow-origins"] == "https://closed.invalid"


def test_ports_are_different_free_and_not_the_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as holders:
        ports = launches.free_ports(5, holders)
        # Nobody else gets one, and a server that reuses addresses listens.
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((launches.HOST, ports[0]))
        socket.create_server((launches.HOST, ports[0])).close()
    assert len(set(ports)) == 5
    assert all(port < 32768 for port in ports)
    assert launches.port_of(Command(env={}, argv=("lmdeploy",))) == 23333
    with ExitStack() as holders, monkeypatch.context() as patched:
        patched.setattr(launches, "port_problem", lambda *_: "no engine could listen there")
        (port,) = launches.free_ports(1, holders)
        with socket.socket() as other:
            other.bind((launches.HOST, port))  # nobody holds it
    monkeypatch.setattr("random.SystemRandom.sample", lambda _, ports, __: ports)
    with ExitStack() as holders:
        (first,) = launches.free_ports(1, holders)
    with ExitStack() as holders:
        assert first not in launches.free_ports(1, holders, besides=first)
        monkeypatch.setattr(launches, "_PORTS", [first] * 65536)  # more than sockets may be open
        with pytest.raises(LaunchError, match="no port"):
            launches.free_ports(2, holders)


# A start takes the plan's cache, whatever share of the free memory that is.


PLAN = plausible_plan(gpus=1, tp=1)
REGION = PLAN.engines[0].kv.region_bytes
PLANNED = PLAN.engines[0].settings.cache_max_entry_count
#: What LMDeploy would find free by the plan when it sizes the cache.
LEFT = REGION / PLANNED


def about(ratio: float) -> object:
    return pytest.approx(ratio, abs=1e-6)


def free(more: int, plan: Plan = PLAN) -> dict[str, int]:
    return {gpu.uuid: gpu.free + more for gpu in plan.ledgers}


@given(st.integers(-2 * GIB, 60 * GIB))
def test_the_cache_has_the_plans_bytes(more: int) -> None:
    ratio = launches.fitted_ratio(PLAN, 0, free(more))
    assert 0 < ratio < 1
    assert 0 <= ratio * (LEFT + more) - REGION < (LEFT + more) / 10**6 + 1


def test_where_that_is_not_there_the_ratio_stays() -> None:
    """What is left is less than the cache: the engine sizes what it can, as it would alone."""
    assert launches.fitted_ratio(PLAN, 0, free(-10 * GIB)) == PLANNED == 0.873
    assert launches.fitted_ratio(PLAN, 0, {}) == PLANNED
    blocks = changed(PLAN, kv=replace(PLAN.engines[0].kv, region_bytes=0))  # it counts blocks
    assert launches.fitted_ratio(blocks, 0, free(MIB)) == PLANNED
    assert launches.fitted_ratio(PLAN, 0, free(0)) == about(PLANNED)


def test_of_several_cards_the_fullest_counts() -> None:
    plan = plausible_plan(gpus=2, tp=2)
    one, two = plan.ledgers
    planned = plan.engines[0].settings.cache_max_entry_count
    lower = plan.engines[0].kv.region_bytes / (plan.engines[0].kv.region_bytes / planned + GIB)
    assert launches.fitted_ratio(plan, 0, {one.uuid: one.free, two.uuid: two.free + GIB}) == about(
        planned
    )
    assert launches.fitted_ratio(plan, 0, {two.uuid: two.free + GIB}) == about(planned)
    assert launches.fitted_ratio(plan, 0, free(GIB, plan)) == about(lower)
    # A card of which the plan left more may have as much more and less.
    wide = replace(two, total=two.total + 2 * GIB, free=two.free + 2 * GIB)
    now = {one.uuid: one.free + GIB, wide.uuid: wide.free - GIB}
    assert launches.fitted_ratio(changed(plan, ledgers=(one, wide)), 0, now) == about(lower)


def test_a_replica_that_starts_again_looks_at_its_own_cards() -> None:
    plan = plausible_plan(gpus=2, tp=1)
    assert len(plan.engines) == 2
    one, two = plan.ledgers
    now = {one.uuid: one.free + GIB, two.uuid: 0}
    planned = plan.engines[0].settings.cache_max_entry_count
    lower = plan.engines[0].kv.region_bytes / (plan.engines[0].kv.region_bytes / planned + GIB)
    assert launches.fitted_ratio(plan, 0, now) == about(lower)
    assert launches.fitted_ratio(plan, 1, now) == planned


def test_in_the_command_line() -> None:
    assert launches.with_ratio(("a", launches.RATIO, "0.8", "b"), 0.25) == (
        "a",
        launches.RATIO,
        "0.250000",
        "b",
    )
    assert launches.with_ratio(("a", "b"), 0.25) == ("a", "b")


def test_what_is_free_of_cards_that_several_models_share(monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu,) = PLAN.ledgers
    used: dict[int, int] = {}
    monkeypatch.setattr("turbofit.serving.gpu_monitor.used_now", lambda _: used)
    assert launches.shared_ratio(PLAN, 0) == launches.ratio_now(PLAN, 0) == PLANNED
    used[gpu.index] = gpu.total - gpu.reserved - gpu.free
    assert launches.shared_ratio(PLAN, 0) == about(PLANNED)
    used[gpu.index] -= 2 * GIB
    assert launches.shared_ratio(PLAN, 0) < PLANNED
    # Another turbofit reserved 2 GiB, and holds none of them.
    sized = launches.ratio_now(PLAN, 0) * (REGION / PLANNED + 2 * GIB)
    assert REGION <= sized < REGION + gpu.total / 10**6
    # Somebody took half a GiB: the cache has its part of that, and not all is left to the margin.
    used[gpu.index] += 5 * GIB // 2
    assert launches.ratio_now(PLAN, 0) == PLANNED
