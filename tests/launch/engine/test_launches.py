"""An engine's process: its environment, its command line, and what the kernel tells of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.plans import plausible_plan
from turbofit import api
from turbofit.core.errors import PackageError
from turbofit.core.installation import install_command
from turbofit.core.plan import Command
from turbofit.core.units import GIB
from turbofit.launch.engine import kernel
from turbofit.launch.engine.launches import (
    KEY,
    Launch,
    find_lmdeploy,
    free_ports,
    module_runner,
    port_of,
)
from turbofit.launch.engine.pretended import PretendLaunch, pretend_machine, pretend_runner
from turbofit.planning.commands import private_commands
from turbofit.pretend.environment import SCENARIO


def test_kills_are_the_groups_own_else_the_machines(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroup / "user" / "me").mkdir(parents=True)
    assert kernel.host_kills(proc=str(proc), cgroup=str(cgroup)) is None
    (proc / "vmstat").write_text("nr_free_pages 3\noom_kill 7\n")
    assert kernel.host_kills(proc=str(proc), cgroup=str(cgroup)) == 7
    (cgroup / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert kernel.host_kills(proc=str(proc), cgroup=str(cgroup)) == 2
    (proc / "self" / "cgroup").write_text("0::/user/me\n")
    (cgroup / "user" / "me" / "memory.events").write_text("oom_kill 1\noom_group_kill 0\n")
    assert kernel.host_kills(proc=str(proc), cgroup=str(cgroup)) == 1


def test_this_machine_answers_or_says_none() -> None:
    assert kernel.host_kills() is None or kernel.host_kills() >= 0
    assert os.path.exists("/proc")


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_without_lmdeploy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(PackageError) as caught:
        find_lmdeploy()
    assert caught.value.exit_code == 7
    assert install_command("lmdeploy") in caught.value.hint


@pytest.mark.parametrize(
    ("version", "refused", "warned"),
    [("0.15.2", True, False), ("0.16.0", False, True), ("0.17.2", False, True),
     ("0.18.0", False, False), ("0.19.0rc1", False, True), ("1.0", False, True)],
)  # fmt: skip
def test_versions(
    version: str, refused: bool, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    if refused:
        with pytest.raises(PackageError, match="older"):
            find_lmdeploy()
    else:
        assert (find_lmdeploy().warning is not None) == warned


DUMP = (
    "import json, os, sys\nprint(json.dumps([sys.argv, os.environ.get('TURBOFIT_ENGINE_KEY')]))\n"
)


def test_the_key_is_in_no_command_line(tmp_path: Path) -> None:
    (tmp_path / "dumps.py").write_text(DUMP)
    command = Command(env={"A": "1"}, argv=("lmdeploy", "serve", "--server-port", "7"), group=0)
    launch = Launch(command, module_runner("dumps"), "secret", hidden=True)
    start = launch.start_command(0)
    assert "secret" not in " ".join(start.argv)
    assert start.env["A"] == "1"
    done = subprocess.run(
        start.argv, env={**start.env, "PYTHONPATH": str(tmp_path)}, capture_output=True, check=True
    )
    (argv, left) = json.loads(done.stdout)
    assert argv[1:] == ["serve", "--server-port", "7", "--api-keys", "secret"]
    # Nor is it handed on to what the engine starts.
    assert left is None
    # One of the user's own is on the command line already.
    assert KEY not in Launch(command, module_runner("x"), "mine").start_command(0).env


def test_an_engine_keeps_no_urls(tmp_path: Path) -> None:
    """LMDeploy parses each image's data: URL, and Python kept the last 128 of them twice."""
    (tmp_path / "parses.py").write_text(
        "import json\nfrom urllib.parse import urlparse, urlsplit\n"
        "path = urlparse('data:image/png;base64,AAAA').path\n"
        "print(json.dumps([path, urlsplit.cache_info().currsize]))\n"
    )
    done = subprocess.run(
        module_runner("parses"),
        env={"PYTHONPATH": str(tmp_path)}, capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == ["image/png;base64,AAAA", 0]


def test_private_commands_are_closed() -> None:
    plan = plausible_plan(gpus=2, tp=1)
    one, two = private_commands(plan, [5001, 5002], "/overlay/InternVL2-8B", "org/name")
    assert [port_of(command) for command in (one, two)] == [5001, 5002]
    assert one.argv[3] == "/overlay/InternVL2-8B"
    assert one.argv[one.argv.index("--model-name") + 1] == "org/name"
    assert one.argv[one.argv.index("--server-name") + 1] == "127.0.0.1"
    assert "--disable-fastapi-docs" in one.argv
    assert one.argv[one.argv.index("--allow-origins") + 1] == "https://closed.invalid"


def test_ports_are_different_free_and_not_the_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("random.SystemRandom.sample", lambda _, ports, __: ports)
        (first,) = free_ports(1)
        assert first not in free_ports(1, besides=first)
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(port < 32768 for port in ports)
    assert port_of(Command(env={}, argv=("lmdeploy",), group=0)) == 23333


def test_lmdeploy_does_not_see_our_folder(tmp_path: Path) -> None:
    """A script's folder comes first on its path; ours has a module named like many others."""
    (tmp_path / "looks.py").write_text("import sys\nprint('\\n'.join(sys.path))\n")
    runner = module_runner("looks")
    done = subprocess.run(
        runner, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert not any(path.endswith("turbofit/launch") for path in done.stdout.splitlines())


@pytest.mark.lmdeploy
def test_a_pretend_neighbour_takes_memory_and_an_allocation_of_the_first_start_fails(
    tmp_path: Path,
) -> None:
    plan = api.plan("internvl2-1b", on="1xrtx3090", engine="turbomind")
    (alone,), (beside,) = (pretend_machine(plan, 0, taken).gpus for taken in (0, GIB))
    assert beside.late - alone.late == GIB
    launch = PretendLaunch(
        plan.commands[0], pretend_runner(plan), plan=plan, folder=tmp_path, taken=GIB, fail_at=60
    )
    scenarios = [
        Path(launch.start_command(number).env[SCENARIO]).read_text() for number in range(2)
    ]
    assert ["fail_at 60" in text for text in scenarios] == [True, False]
    assert all(str(beside.late) in text for text in scenarios)
