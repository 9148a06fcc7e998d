"""The actor of a node, without Ray: it keeps a server, and ends it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.processes import put_for_python
from tests.support.waiting import HANG, until
from turbofit import api
from turbofit.core.cluster import NodePlan, NodeStatus
from turbofit.core.process.processes import start_time
from turbofit.serving.cluster import node
from turbofit.serving.cluster.node import DRAINED, NodeActor

SERVER = 'echo $$ > pid; echo "$@" > words; env > env; echo http://127.0.0.1:5; exec sleep 600'
PLANNED = NodePlan(
    node="a" * 56, name="here", address="127.0.0.1", cards="1x L4",
    plan=api.plan("internvl2-1b", on="1xl4"),
)  # fmt: skip


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes an actor, whose server is a script in the place of ``python -m turbofit serve …``."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    made: list[NodeActor] = []

    def make(script: str = SERVER, **changes: Any) -> NodeActor:
        put_for_python(tmp_path, monkeypatch, script)
        made.append(
            NodeActor("run", replace(PLANNED, **changes), ("--pretend",), "secret", "claim")
        )
        return made[-1]

    yield make
    for actor in made:
        actor.end()


def when(actor: NodeActor, state: str) -> NodeStatus:
    until(lambda: actor.get_status().state == state, state)
    return actor.get_status()


def test_it_serves_with_a_key_and_without_rays_variables(
    add: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_JOB_ID", "1")
    actor = add()
    told = when(actor, "serving")
    folder = Path(told.folder)
    words = (folder / "words").read_text()
    assert f"serve --plan {folder}/plan.json --host 127.0.0.1" in words
    assert f"--front-key-file {folder}/key --pretend" in words
    assert (folder / "key").read_text() == "secret"
    assert "secret" not in words
    assert (actor.address().key, actor.address().url) == ("secret", "http://127.0.0.1:5")
    assert (told.serves, told.at_once > 0, told.cards) == ("run", True, "1x L4 (pretend)")
    environ = dict(line.partition("=")[::2] for line in (folder / "env").read_text().splitlines())
    assert environ["RAY_ADDRESS"] == "local"
    assert "RAY_JOB_ID" not in environ
    pid = int((folder / "pid").read_text())
    assert os.getsid(pid) != os.getsid(0)
    actor.end()
    assert not when(actor, "drained").url
    assert not start_time(pid)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('echo "error: no room" >&2; echo "hint: buy" >&2; exit 6', "no room"),
        (SERVER, "its turbofit serve has ended"),
    ],
)
def test_a_server_that_ends_is_not_started_again(add: Any, script: str, why: str) -> None:
    actor = add(f"echo x >> starts; {script}")
    folder = Path(actor.get_status().folder)
    if script == SERVER:
        when(actor, "serving")
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    told = when(actor, "unfit")
    assert (told.why_not, told.url) == (why, "")
    assert (folder / "starts").read_text() == "x\n"


@pytest.mark.parametrize(("why", "state"), [("no room", "unfit"), (DRAINED, "drained")])
def test_a_node_without_a_plan_says_why(add: Any, why: str, state: str) -> None:
    actor = add(plan=None, why_not=why)
    told = actor.get_status()
    assert (told.state, told.why_not, told.at_once) == (state, why, 0)
    actor.end()
    assert actor.get_status().state == "drained"


def test_a_controller_with_the_same_claim_takes_it_over(add: Any) -> None:
    actor = add()
    assert actor.taken_over("another") is None
    assert actor.taken_over("claim") == PLANNED
    when(actor, "serving")
    assert actor.taken_over("claim") == PLANNED
    actor.end()
    when(actor, "drained")
    assert actor.taken_over("claim") == PLANNED  # a drained node stays so
    assert add(plan=None, why_not="no room").taken_over("claim") is None


@pytest.mark.parametrize("serves", [True, False])
def test_without_a_controller_it_ends_its_server_and_then_itself(
    add: Any, monkeypatch: pytest.MonkeyPatch, serves: bool
) -> None:
    began = -1e6  # to actors of other tests, which look at this clock, too, no time has passed
    now, ended = [began], threading.Event()
    monkeypatch.setattr(node.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(node.time, "sleep", lambda _: os.sched_yield())
    monkeypatch.setattr(node.ray_adapter, "kill_actor", ended.set)
    actor = add() if serves else add(plan=None, why_not="no room")
    if serves:
        when(actor, "serving")
    pid = int((Path(actor.get_status().folder) / "pid").read_text()) if serves else 0
    now[0] = began + 500
    assert actor.get_status().said == "no controller for 500 s; it ends after 600 s without one"
    assert "no controller" not in actor.keep_alive().said
    now[0] = began + 1099
    assert "no controller for 599 s" in actor.get_status().said
    assert not ended.is_set()
    now[0] = began + 1100
    assert ended.wait(HANG)
    assert (actor.get_status().state, actor.get_status().url) == ("unfit", "")
    assert actor.taken_over("claim") is None
    assert not serves or not start_time(pid)
