"""Cluster nodes: what each runs, what `--cluster` may name, and how Ray's errors are told."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from msgspec.structs import replace

from tests.fixtures.clusters import cluster, node
from tests.support.processes import HANG, put_for_python
from tests.support.waiting import until
from turbofit.core.cluster import Node
from turbofit.core.errors import MachineError, PackageError, UsageError
from turbofit.core.installation import install_command
from turbofit.core.machine import Machine
from turbofit.core.process.files import StateFile
from turbofit.core.units import GIB
from turbofit.core.version import __version__
from turbofit.launch.cluster import node as module
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.node import NodeActor, NodeReport
from turbofit.launch.cluster.nodes import cluster_from, held_only, measure_here, node_of
from turbofit.launch.cluster.ray_adapter import RayCallError
from turbofit.launch.engine.kernel import start_time
from turbofit.launch.serve.options import ray_address
from turbofit.machine.source import save_snapshot
from turbofit.machine.spec import parse_spec

ACTORS: list[NodeActor] = []
HERE = Node(id="a" * 56, name="here", address="127.0.0.1", gpus=2)
#: It serves as long as its lease is there.
SERVER = """
echo $$ > pid; echo "$@" > words; env > env; echo http://127.0.0.1:5
while [ -e $(sed 's/.*--lease //; s/ .*//' words) ]; do sleep 0.05; done
"""


@pytest.fixture
def serve_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """What runs in the place of ``python -m turbofit serve …``."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(module, "_TICK", 0.02)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)

    monkeypatch.setattr(ray_adapter, "gpus_of_this_task", lambda: ["0"])
    here = Node(id="", name="", address="", machine=parse_spec("2xrtx3090"))
    monkeypatch.setattr(module, "measure_here", lambda pretend: here)
    yield partial(put_for_python, tmp_path, monkeypatch)
    for made in ACTORS:
        made._gone.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "life"]:
        thread.join()  # it may be starting a server
    while ACTORS:
        if (child := ACTORS.pop()._child) is not None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def actor() -> NodeActor:
    ACTORS.append(NodeActor("name", HERE, 0, True))
    return ACTORS[-1]


def opened(made: NodeActor, digest: str) -> int:
    """Its server's process, once it is open."""
    until(lambda: (made.tell().state, made.tell().digest) == ("open", digest), f"{digest} open")
    return int((Path(made.tell().folder) / "pid").read_text())


def idle(made: NodeActor) -> NodeReport:
    return until(lambda: made.tell() if made.tell().measured else None, "the end")


def test_it_serves_with_a_lease_and_a_key_and_without_rays_variables(serve_is, monkeypatch) -> None:
    serve_is(SERVER)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_JOB_ID", "1")
    made = actor()
    made.serve("d1", "{}", ("--pretend",))
    pid, told = opened(made, "d1"), made.tell()
    folder = Path(told.folder)
    words = (folder / "words").read_text()
    assert f"serve --plan {folder}/plan-d1.json --host 127.0.0.1 --port 0" in words
    assert f"--front-key-file {folder}/key --lease {folder}/lease-d1 --pretend" in words
    assert told.key == (folder / "key").read_text().strip()
    assert told.key not in words
    environ = dict(line.partition("=")[::2] for line in (folder / "env").read_text().splitlines())
    assert environ["RAY_ADDRESS"] == "local"
    assert "RAY_JOB_ID" not in environ
    assert os.getsid(pid) != os.getsid(0)
    assert not told.measured
    made.end()
    here = idle(made).measured
    assert here == replace(HERE, gpus=0, machine=here.machine)
    assert here.machine.visible == (0,)
    assert not start_time(pid)


def test_a_server_has_no_lower_priority_than_ray_itself(serve_is, monkeypatch) -> None:
    """Where the user may not raise it, it stays as Ray's workers have it."""
    refused = Mock(side_effect=PermissionError)
    monkeypatch.setattr(os, "setpriority", refused)
    assert idle(actor()).state == "idle"
    refused.assert_called_once_with(os.PRIO_PROCESS, 0, 0)


def test_the_next_actor_adopts_what_lives_and_ends_what_is_another_plan(serve_is) -> None:
    serve_is(SERVER)
    first = actor()
    first.serve("d1", "{}", ())
    pid, told = opened(first, "d1"), first.tell()
    first._gone.set()  # it dies
    second = actor()
    assert opened(second, "d1") == pid
    assert (second.tell().key, second.tell().url) == (told.key, told.url)
    second.serve("d2", "{}", ())
    assert opened(second, "d2") != pid
    assert not start_time(pid)


def test_a_node_that_cannot_be_measured_ends_its_server_all_the_same(serve_is, monkeypatch) -> None:
    serve_is(SERVER)
    made = actor()
    made.serve("d1", "{}", ())
    opened(made, "d1")

    def broken(pretend: bool) -> bytes:
        raise RuntimeError("no driver")

    monkeypatch.setattr(module, "measure_here", broken)
    made.end()
    until(lambda: made.tell().state == "idle", "the end")
    until(lambda: made.tell().why == "RuntimeError: no driver", "the reason")


def test_a_server_ends_where_nothing_can_be_written(serve_is, monkeypatch) -> None:
    serve_is(SERVER)
    made = actor()
    made.serve("d1", "{}", ())
    pid = opened(made, "d1")
    monkeypatch.setattr(StateFile, "write", lambda *_: None)
    made.end()
    idle(made)
    assert not start_time(pid)


def test_an_actor_that_has_not_looked_yet_says_nothing_of_a_server(serve_is, monkeypatch) -> None:
    monkeypatch.setattr(module, "_TICK", HANG)
    assert actor().tell().state == ""


def test_of_a_killed_server_there_is_no_exit_code(serve_is) -> None:
    serve_is(SERVER)
    made = actor()
    made.serve("d1", "{}", ())
    os.kill(opened(made, "d1"), signal.SIGKILL)
    told = until(lambda: made.tell() if made.tell().state == "unfit" else None, "its end")
    assert (told.why, told.exit_code) == ("its turbofit serve has ended", 0)


def test_an_idle_node_is_measured_at_each_look(serve_is, monkeypatch) -> None:
    made = actor()
    idle(made)
    later = Node(id="", name="", address="", why_not="later")
    monkeypatch.setattr(module, "measure_here", lambda pretend: later)
    until(lambda: idle(made).measured.why_not == "later", "what a killed server's memory is by now")


@pytest.mark.parametrize("code", [2, 3, 6])
def test_a_server_that_ends_with_an_error_is_not_started_again(serve_is, code: int) -> None:
    serve_is(f'echo x >> starts; echo "error: no room" >&2; echo "hint: buy" >&2; exit {code}')
    made = actor()
    made.serve("d1", "{}", ())
    told = until(lambda: made.tell() if made.tell().state == "unfit" else None, "it to be unfit")
    assert (told.why, told.exit_code) == ("no room", code)
    assert (Path(told.folder) / "starts").read_text() == "x\n"


def test_it_ends_what_an_old_run_has_left_and_measures_then(serve_is) -> None:
    serve_is(SERVER)
    old = actor()
    old.serve("d1", "{}", ())
    pid, key = opened(old, "d1"), old.tell().key
    old._gone.set()
    new = actor()
    new.end()
    idle(new)
    assert not start_time(pid)
    new.serve("d1", "{}", ())
    assert new.tell().key not in ("", key)


def test_a_server_whose_actor_dies_at_its_start_is_known_to_the_next(serve_is) -> None:
    """The lock is the server's before it begins, whoever is killed meanwhile."""
    serve_is(f"echo x >> starts; sleep 0.3; {SERVER}")
    first = actor()
    first.serve("d1", "{}", ())
    folder = Path(first.tell().folder)
    until((folder / "starts").exists, "the start")
    first._gone.set()
    between = until(lambda: first._child, "the shell")
    between.kill()  # the shell, which a worker of Ray takes with it
    between.wait()
    second = actor()
    pid = opened(second, "d1")
    assert (folder / "starts").read_text() == "x\n"
    second.end()
    idle(second)
    assert not start_time(pid)


def test_simulated_machines_are_described_and_say_so() -> None:
    found = cluster_from("sim:4xrtx3090@3/8xh100,ram=512GiB@2/1xl4:free=19GiB")
    assert found.source == (
        "simulated: 3 of 4xrtx3090, 2 of 8xh100,ram=512GiB, 1 of 1xl4:free=19GiB"
    )
    assert [len(one.machine.gpus) for one in found.nodes if one.machine] == [4, 4, 4, 8, 8, 1]
    assert len({one.id for one in found.nodes}) == 6
    assert not any(one.turbofit or one.lmdeploy for one in found.nodes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sim:", "SPEC"),
        ("sim:4xrtx3090@0", "SPEC@COUNT"),
        ("sim:4xrtx3090@many", "SPEC@COUNT"),
        ("sim:4xrtx3090@99999", "SPEC@COUNT"),
        ("sim:1xl4@6000/1xl4@6000", "SPEC@COUNT"),
        ("sim:4xnosuchcard@2", "nosuchcard"),
        ("rays", "is no cluster"),
        ("sim:nowhere.json@2", "cannot be read"),
        ("sim:./node.json@2", "/ parts machines"),
        ("", "is no cluster"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        cluster_from(text)
    assert said in refused.value.message
    assert refused.value.hint


def test_a_snapshot_is_a_machine_of_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = node(1, "2xrtx3090", [3 * GIB, 0]).machine
    assert saved is not None
    save_snapshot(saved, "box.json")
    found = cluster_from("sim:box.json@2/1xl4")
    assert [one.machine and one.machine.visible for one in found.nodes] == [(0, 1), (0, 1), (0,)]
    assert [one.machine.gpus[0].used for one in found.nodes if one.machine][:2] == [3 * GIB] * 2


@pytest.mark.parametrize(
    ("text", "address"), [("ray", None), ("ray:10.0.0.1:6379", "10.0.0.1:6379")]
)
def test_ray_is_asked_only_where_it_is_named(
    text: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_nodes = Mock(return_value=cluster("1xl4"))
    monkeypatch.setattr("turbofit.launch.cluster.nodes.measure_nodes", measure_nodes)
    assert cluster_from(text) == cluster("1xl4")
    measure_nodes.assert_called_once_with(address)


# What a node tells of itself, and which GPU Ray means.


def test_a_node_that_pretends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOFIT_NODE_SPEC", "2xrtx3090")
    node = measure_here()
    assert node.machine is not None
    assert len(node.machine.gpus) == 2
    assert (node.pretend, node.turbofit, node.why_not) == (True, __version__, "")


def test_a_node_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOFIT_NODE_SPEC", "3xnosuchcard")
    node = measure_here()
    assert node.machine is None
    assert "nosuchcard" in node.why_not


def test_why_a_node_says_nothing_is_told_in_words() -> None:
    missing = RayCallError("ray::f\nModuleNotFoundError: No module named 'turbofit'")
    assert node_of(HERE, missing).why_not == "turbofit is not installed there"
    other = RayCallError("System error: Unexpected keyword argument 'cores'\ntraceback: …")
    assert "answers otherwise" in node_of(HERE, other).why_not
    assert "the node died" in node_of(HERE, RayCallError("the node died")).why_not
    assert "no GPU" in node_of(HERE, None).why_not


def held(machine: Machine, *gpus: str) -> tuple[int, ...]:
    node = held_only(Node(id="a", name="a", address="", machine=machine), gpus)
    assert node.machine is not None
    return node.machine.visible


def test_a_node_is_planned_for_the_gpus_that_its_actor_has() -> None:
    """Ray names entries of CUDA_VISIBLE_DEVICES: indices or UUIDs."""
    machine = replace(parse_spec("4xrtx3090"), source="nvml")
    assert held(machine, "3", "0", machine.gpus[2].uuid) == (0, 2, 3)
    assert held(replace(machine, visible=(0, 1)), "1", "2") == (1,)
    many = held_only(Node(id="a", name="a", address="", machine=machine), ["9"])
    assert (many.machine, "'9'" in many.why_not) == (None, True)
    # A pretend machine may have fewer than Ray was told.
    assert held(parse_spec("2xrtx3090"), "0", "1", "2") == (0, 1)


def connect(address: str | None = None) -> None:
    with ray_adapter.connected(address):
        pass


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the connection needs the package, and says so."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(PackageError, match="not installed") as info:
        connect()
    assert install_command("ray") in info.value.hint


def test_ray_client_is_refused() -> None:
    """It is no node: engines could not be reached from it."""
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="Ray Client"):
        connect("ray://10.0.0.1:10001")


def test_addresses() -> None:
    assert ray_address("ray") is None
    assert ray_address("ray:10.0.0.1:6379") == "10.0.0.1:6379"
    with pytest.raises(UsageError, match="no Ray cluster"):
        ray_address("slurm")


def test_what_is_not_there_yet_is_told_from_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    late, *raised = (
        ray.exceptions.GetTimeoutError("late"),
        ray.exceptions.ActorDiedError(),
        ray.exceptions.NodeDiedError("gone"),
    )
    get = Mock(side_effect=[late, *raised])
    monkeypatch.setattr(ray, "get", get)
    assert ray_adapter.outcome("call", 0.5) is None
    get.assert_called_once_with("call", timeout=0.5)
    for error in raised:
        failed = ray_adapter.outcome("call", 0.5)
        assert (type(failed), str(failed)) == (RayCallError, str(error))


def test_a_silent_head_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a minute of waiting Ray raises another error than where it finds no actor."""
    ray = pytest.importorskip("ray")

    def silent(*_: object, **__: object) -> None:
        raise ray.exceptions.GetTimeoutError("There was timeout, probably the GCS server is dead")

    monkeypatch.setattr("ray.util.list_named_actors", silent)
    with pytest.raises(MachineError, match="head of the Ray cluster does not answer"):
        ray_adapter.boards(None)
