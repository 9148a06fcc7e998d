"""``turbofit serve --cluster`` on a Ray cluster of pretend machines: all that may happen to one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cloud import STAND_IN, Clients, Cloud, Serving, cli, cloud_of, until
from tests.support.processes import Child
from tests.support.serving import needs
from tests.sweep import part
from turbofit.launch.engine.kernel import start_time

pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow]
needs("ray", "lmdeploy", "fastapi", "torchvision")

MODEL = "internvl2-2b"
#: Of so many requests at a kill, those that may be lost: what was in flight at the node.
REQUESTS, MOST_LOST = part(300, 10), 4


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(STAND_IN, id="standin"),
        pytest.param({}, id="engine", marks=pytest.mark.exhaustive),
    ],
)
def cloud(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Cloud]:
    """Three unlike nodes, with stand-ins for engines; the head is too small for the promise."""
    state = str(tmp_path_factory.mktemp("state"))
    with cloud_of(
        ("small", "2xl4:free=3GiB", 2), ("large", "1xa100", 1), ("one", "1xl4", 1),
        XDG_STATE_HOME=state, TURBOFIT_LEASES=f"{state}/leases", **request.param,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def serving(cloud: Cloud) -> Iterator[Serving]:
    children: list[Child] = []
    state = Path(cloud.environ["XDG_STATE_HOME"])
    # That the worst requests are answered before a server opens, and standbys, are tested alone.
    words = ("--api-key", "secret", "--check", "none", "--no-standby")
    made = Serving(children, cloud, state, *words, model=MODEL)
    made.wait(2)
    yield made
    for child in children:
        child.kill()


def test_1_a_node_that_cannot_keep_the_promise_says_why(serving: Serving) -> None:
    def settled() -> dict[str, Any]:
        nodes = {one["id"]: one for one in serving.status()["nodes"]}
        found = {name: nodes[serving.cloud.identity(name)] for name in ("small", "large", "one")}
        # The front knows a node before the status does, which is written each second.
        return found if found["large"]["at_once"] > found["one"]["at_once"] > 0 else {}

    small = until(settled)["small"]
    assert small["state"] == "unfit"
    assert "GPU 0 is" in small["why_not"]
    code, told = serving.cli("drain", "nobody")
    assert (code, told["error"]["kind"]) == (2, "usage")
    logs = "".join(path.read_text(errors="replace") for path in serving.ray_logs())
    assert serving.key("large") not in logs


@pytest.mark.parametrize(  # another actor that adopts it: `test_node`
    "who",
    [
        pytest.param("engine", marks=pytest.mark.exhaustive),
        "serve",
        pytest.param("actor", marks=pytest.mark.exhaustive),
    ],
)
def test_2_kills_cost_what_was_in_flight_and_the_node_serves_again(
    cloud: Cloud, serving: Serving, who: str
) -> None:
    before = serving.server("one")
    with Clients(serving.port) as clients:
        clients.more(20)
        if who == "engine":
            os.kill(cloud.engine_pids("one")[0], signal.SIGKILL)
        elif who == "serve":
            os.kill(before, signal.SIGKILL)
        else:
            os.kill(serving.actor("one"), signal.SIGKILL)
        clients.more(20)
        if who == "serve":
            clients.meanwhile(lambda: serving.server("one") not in (0, before))
        clients.meanwhile(lambda: serving.up("one") and serving.up() == 2)
        clients.more(max(20, REQUESTS - clients.outcomes["kept"]))
    assert not clients.failed, clients.outcomes
    assert clients.lost <= (0 if who == "actor" else MOST_LOST), clients.outcomes
    if who == "actor":
        assert serving.server("one") == before  # the next actor has adopted it


def test_3_a_change_goes_node_by_node_and_loses_nothing(serving: Serving) -> None:
    code, told = serving.cli("change", "--margin", "39GiB")
    assert code == 3, told
    assert told["error"]["hint"].startswith("nothing has changed")
    with Clients(serving.port) as clients:
        clients.more(4)
        code, told = serving.cli("change", "--context", "16384")
        assert code == 0, told
        assert "either plan's limits" in told["said"]
        clients.meanwhile(lambda: "the plan has changed" in serving.child.stderr)
        serving.wait(2)
        clients.more(max(4, REQUESTS - clients.outcomes["kept"]))
    assert not clients.lost, clients.outcomes
    assert serving.status()["promise"].startswith("16,384 tokens")


@pytest.mark.exhaustive  # without Ray: `test_controller`
def test_4_a_node_joins_and_another_is_drained(cloud: Cloud, serving: Serving) -> None:
    servers = serving.server("large"), serving.server("one")
    with Clients(serving.port) as clients:
        cloud.add("late", "1xl4", 1)
        clients.meanwhile(lambda: serving.up() == 3)
        clients.more(20)
        code, told = serving.cli("drain", cloud.identity("late"))
        assert code == 0, told
        clients.meanwhile(lambda: "is drained" in serving.child.stderr)
        clients.more(max(20, REQUESTS - clients.outcomes["kept"]))
    assert serving.node("late")["state"] == "drained"
    assert not clients.lost, clients.outcomes
    assert (serving.server("large"), serving.server("one")) == servers


@pytest.mark.exhaustive  # without Ray: `test_front`, `test_node`
def test_5_another_front_serves_the_same_nodes_whose_board_starts_again(serving: Serving) -> None:
    os.kill(serving.board(), signal.SIGKILL)
    until(lambda: serving.status()["nodes"])
    port = serving.front()
    with Clients(port) as clients:
        clients.more(20)
    assert not clients.lost, clients.outcomes


@pytest.mark.exhaustive  # without Ray: `test_controller`
def test_6_a_controller_that_is_killed_is_started_again(serving: Serving) -> None:
    servers = serving.server("large"), serving.server("one")
    serving.child.process.kill()
    serving.child.process.wait()
    serving.again()
    serving.wait(2)
    assert "going on with what an earlier" in serving.child.stderr
    assert (serving.server("large"), serving.server("one")) == servers
    assert serving.status()["promise"].startswith("16,384 tokens")


def test_7_a_raylet_dies(cloud: Cloud, serving: Serving) -> None:
    server = serving.server("one")
    with Clients(serving.port) as clients:
        clients.more(20)
        cloud.kill("one")
        clients.meanwhile(lambda: serving.up() == 1 and not start_time(server))
        clients.more(max(20, REQUESTS - clients.outcomes["kept"]))
    assert not clients.failed, clients.outcomes
    assert clients.lost <= MOST_LOST, clients.outcomes


def test_8_the_end_leaves_nothing(cloud: Cloud, serving: Serving) -> None:
    server = serving.server("large")
    assert serving.end() == 0
    assert not cloud.engine_pids()
    assert not start_time(server)  # a process 1 that reaps nobody keeps its entry
    code, told = serving.cli("status")
    assert (code, told["error"]["kind"]) == (2, "usage")


@pytest.mark.exhaustive  # what nodes say of themselves, as `serve` asks them above: `test_node`
def test_9_nodes_are_planned_for_and_nothing_is_taken(cloud: Cloud, tmp_path: Path) -> None:
    cloud.add("none", "1xl4", 0)
    code, plan = cli(tmp_path, "plan", MODEL, "--cluster", cloud.address)
    assert code == 0, plan
    nodes = {node["node"]: node for node in plan["nodes"]}
    assert nodes[cloud.identity("large")]["plan"]["machine"]["gpus"]
    assert "GPU 0 is" in nodes[cloud.identity("small")]["why_not"]
    assert "no GPU" in nodes[cloud.identity("none")]["why_not"]
