"""The actor of a node, without Ray: it keeps a server, adopts one, and ends one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.processes import HANG, put_for_python
from tests.support.waiting import until
from turbofit import api
from turbofit.core.cluster import NodePlan, NodeStatus
from turbofit.serving.cluster import node as module
from turbofit.serving.cluster import ray_adapter
from turbofit.serving.cluster.node import NodeActor
from turbofit.serving.engine.kernel import start_time

#: It serves as long as its lease is there.
SERVER = """
echo $$ > pid; echo "$@" > words; env > env; echo http://127.0.0.1:5
while [ -e "$TURBOFIT_NODE_LEASE" ]; do sleep 0.05; done
"""


class Actors:
    """Actors in this process; each ends its process where a real one would."""

    def __init__(self) -> None:
        self.made: list[NodeActor] = []
        self.ended, self.over = threading.Event(), threading.Event()
        self.planned = NodePlan(
            node="a" * 56, name="here", address="127.0.0.1", cards="1x L4",
            plan=api.plan("internvl2-1b", on="1xl4"),
        )  # fmt: skip

    def add(self, key: str = "key", **changes: Any) -> NodeActor:
        planned = replace(self.planned, **changes)
        self.made.append(NodeActor("run", planned, ("--pretend",), key))
        return self.made[-1]

    def die(self, actor: NodeActor) -> None:
        """Its process is killed: its thread goes, and so does its lock."""
        actor._look = self.over.wait  # type: ignore[assignment]
        actor._alive.close()


@pytest.fixture
def serve_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What runs in the place of ``python -m turbofit serve …``."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(module, "_TICK", 0.02)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    return partial(put_for_python, tmp_path, monkeypatch)


@pytest.fixture
def actors(serve_is: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Actors]:
    actors = Actors()

    def exit_(_: int) -> None:
        actors.ended.set()

    monkeypatch.setattr(module.os, "_exit", exit_)
    yield actors
    monkeypatch.setattr(module.os, "getppid", lambda: -1)  # each ends its server, and itself
    actors.over.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "life"]:
        thread.join()
    for actor in actors.made:
        if actor._child is not None:
            with suppress(ProcessLookupError):
                os.killpg(actor._child.pid, signal.SIGKILL)
            actor._child.wait()


def opened(actor: NodeActor) -> int:
    """Its server's process, once it is open."""
    until(lambda: actor.tell().state == "serving", "its server")
    return int((Path(actor.tell().folder) / "pid").read_text())


def when(actor: NodeActor, state: str) -> NodeStatus:
    until(lambda: actor.tell().state == state, state)
    return actor.tell()


def test_it_serves_with_a_lease_and_a_key_and_without_rays_variables(
    serve_is: Any, actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_is(SERVER)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_JOB_ID", "1")
    actor = actors.add(key="secret")
    pid, told = opened(actor), actor.tell()
    folder = Path(told.folder)
    words = (folder / "words").read_text()
    assert f"serve --plan {folder}/plan.json --host 127.0.0.1" in words
    assert f"--front-key-file {folder}/key " in words
    assert f"TURBOFIT_NODE_LEASE={folder}/lease-" in (folder / "env").read_text()
    assert words.endswith("--pretend\n")
    assert (folder / "key").read_text() == "secret"
    assert "secret" not in words
    assert (actor.address().key, actor.address().url) == ("secret", "http://127.0.0.1:5")
    assert (told.serves, told.at_once > 0, told.cards) == ("run", True, "1x L4 (pretend)")
    environ = dict(line.partition("=")[::2] for line in (folder / "env").read_text().splitlines())
    assert environ["RAY_ADDRESS"] == "local"
    assert "RAY_JOB_ID" not in environ
    assert os.getsid(pid) != os.getsid(0)
    actor.end()
    assert not when(actor, "drained").url
    assert not start_time(pid)


def test_the_next_actor_adopts_what_lives_and_ends_what_is_another_server(
    serve_is: Any, actors: Actors
) -> None:
    serve_is(SERVER)
    first = actors.add()
    pid = opened(first)
    actors.die(first)
    second = actors.add()
    assert opened(second) == pid
    actors.die(second)
    third = actors.add(key="another")
    assert until(lambda: opened(third) != pid, "another server")
    assert not start_time(pid)


def test_a_lease_is_renewed_by_the_controller_alone(serve_is: Any, actors: Actors) -> None:
    """So no server lives on when that has gone, and its actor then goes, too."""
    serve_is(SERVER)
    actor = actors.add()
    opened(actor)
    old = actor._lease.stat().st_mtime_ns
    assert actor.tell().silent > 50
    assert actor._lease.stat().st_mtime_ns == old
    actor.tell(renew=True)
    assert actor._lease.stat().st_mtime_ns > old
    assert actor.tell().silent < 50


def test_an_actor_without_a_controller_goes_once_its_server_has_ended(
    serve_is: Any, actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_is(SERVER)
    gone = threading.Event()
    monkeypatch.setattr(ray_adapter, "kill_actor", gone.set)
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.0)
    pid = opened(actors.add())
    assert not gone.is_set()
    os.kill(pid, signal.SIGTERM)  # as it does to itself without a lease
    assert gone.wait(HANG)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('echo "error: no room" >&2; echo "hint: buy" >&2; exit 6', "no room"),
        (f"{SERVER}; kill -9 $$", "its turbofit serve has ended"),
    ],
)
def test_a_server_that_ends_is_not_started_again(
    serve_is: Any, actors: Actors, script: str, why: str
) -> None:
    serve_is(f"echo x >> starts; {script}")
    actor = actors.add()
    if "kill" in script:
        os.kill(opened(actor), signal.SIGKILL)
    told = when(actor, "unfit")
    assert (told.why_not, told.url) == (why, "")
    assert (Path(told.folder) / "starts").read_text() == "x\n"


def test_a_node_without_a_plan_says_why_and_ends_what_an_old_run_has_left(
    serve_is: Any, actors: Actors
) -> None:
    serve_is(SERVER)
    old = actors.add()
    pid = opened(old)
    actors.die(old)
    new = actors.add(plan=None, why_not="no room")
    assert when(new, "unfit").why_not == "no room"
    assert not start_time(pid)


def test_a_drained_node_serves_nothing_whoever_comes_next(serve_is: Any, actors: Actors) -> None:
    serve_is(SERVER)
    first = actors.add()
    pid = opened(first)
    first.end(drained=True)
    when(first, "drained")
    assert not start_time(pid)
    actors.die(first)
    second = actors.add(key="another")
    assert when(second, "drained").at_once > 0
    actors.die(second)
    assert when(actors.add(plan=None, why_not="it is drained"), "drained").at_once == 0


def test_a_server_ends_when_the_node_has_left_the_cluster(
    serve_is: Any, actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_is(SERVER)
    actor = actors.add()
    pid = opened(actor)
    monkeypatch.setattr(module.os, "getppid", lambda: 1)
    assert actors.ended.wait(HANG)
    until(lambda: not start_time(pid), "the end of its server")


def test_a_server_whose_actor_dies_at_its_start_is_known_to_the_next(
    serve_is: Any, actors: Actors
) -> None:
    """The lease is locked before it begins, whoever is killed meanwhile."""
    serve_is(f"echo x >> starts; sleep 0.3; {SERVER}")
    first = actors.add()
    folder = Path(first.tell().folder)
    until((folder / "starts").exists, "the start")
    actors.die(first)
    between = until(lambda: first._child, "the shell")
    between.kill()  # the shell, which a worker of Ray takes with it
    between.wait()
    second = actors.add()
    opened(second)
    assert (folder / "starts").read_text() == "x\n"
