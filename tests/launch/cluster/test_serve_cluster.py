"""``turbofit serve --cluster`` on a Ray cluster of pretend machines: all that may happen to one."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow]
for needed in ("ray", "lmdeploy", "fastapi", "torchvision"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed}", allow_module_level=True)

from bench.cluster.cloud import (  # noqa: E402
    Clients,
    Cloud,
    Serving,
    cli,
    cloud_of,
    until,
)
from tests.support.processes import Child  # noqa: E402

MODEL = "internvl2-2b"
CLIENTS = 2


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    """Four bridged cards, two that reach each other, and one alone."""
    with cloud_of(
        ("four", "4xrtx3090,nvlink=0-2+1-3", 4), ("two", "2xrtx3090", 2), ("one", "1xl4", 1)
    ) as made:
        yield made


def nothing_left(cloud: Cloud, serving: Serving) -> bool:
    """No engine, no actor, no placement group."""
    import ray
    from ray.util import placement_group_table

    if cloud.engine_pids():
        return False
    ray.init(address=cloud.address.removeprefix("ray:"), logging_level="ERROR")
    try:
        groups = {one["state"] for one in placement_group_table().values()}
        gpus = ray.available_resources().get("GPU", 0)
        return groups <= {"REMOVED"} and gpus == ray.cluster_resources().get("GPU", 0)
    finally:
        ray.shutdown()


def test_the_life_of_a_cluster(cloud: Cloud, children: list[Child], tmp_path: Path) -> None:
    """Placed, killed piece by piece under load; nothing is left of it.

    Nodes that join and a change of plan: `bench/cluster/faults.py`, and `test_keeper` without Ray.
    """
    serving = Serving(children, cloud, tmp_path, "--tp", "2", model=MODEL)
    serving.wait(3)
    # By topology: the bridges decide, not the order; a node of one card cannot.
    assert [one["gpus"] for one in serving.engines("four")] == [[0, 2], [1, 3]]
    assert [one["gpus"] for one in serving.engines("two")] == [[0, 1]]
    left_out = {node["id"]: node["why_not"] for node in serving.status()["nodes"]}
    assert "1" in left_out[cloud.identity("one")]

    with Clients(serving.port, CLIENTS) as clients:
        clients.more(5)

        # An actor dies, and its engine with it: Ray starts it again.
        name = serving.engines("two")[0]["name"]
        (pid,) = _actors(serving, cloud.identity("two"))
        os.kill(pid, signal.SIGKILL)
        until(lambda: _named(serving, name)["restarts"] == 1)
        serving.wait(3)
        clients.more(5)

        # A node dies.
        cloud.kill("two")
        until(lambda: len(serving.engines()) == 2)
        clients.more(5)

        # A plan that cannot be is refused, and changes nothing.
        code, told = serving.cli("change", "--margin", "23GiB")
        assert code == 3, told
        assert told["error"]["hint"].startswith("nothing has changed")
        clients.more(5)
        assert not clients.failed
        # Only what a dying engine had may have been lost.
        assert clients.outcomes["broken"] + clients.outcomes["lost"] <= 2 * CLIENTS

    code, told = serving.cli("status")
    assert code == 0
    assert told[0]["model"].endswith("InternVL2-2B")
    assert serving.end() == 0
    until(lambda: nothing_left(cloud, serving))


def test_what_is_measured_can_be_planned_for_elsewhere(
    cloud: Cloud, children: list[Child], tmp_path: Path
) -> None:
    """Nodes as a file, and a plan of it; nothing is taken by either."""
    code, found = cli(tmp_path, "cluster", "nodes", "--pretend", "--cluster", cloud.address)
    assert code == 0, found
    named = {node["id"]: node for node in found["nodes"]}
    assert len(named[cloud.identity("one")]["machine"]["gpus"]) == 1
    assert "no GPU" in next(node["why_not"] for node in found["nodes"] if not node["machine"])
    (tmp_path / "nodes.json").write_text(json.dumps(found))
    code, plan = cli(tmp_path, "plan", MODEL, "--cluster", str(tmp_path / "nodes.json"))
    assert code == 0, plan
    assert plan["engines"] >= 3
    # As they are, and not as they pretend to be: there is no GPU on this host.
    code, plan = cli(tmp_path, "plan", MODEL, "--cluster", cloud.address)
    assert code in (3, 4), plan
    code, told = cli(tmp_path, "cluster", "status", "--cluster", cloud.address)
    assert (code, told["error"]["kind"]) == (2, "usage")


def test_an_engine_that_runs_out_of_memory(
    cloud: Cloud, children: list[Child], tmp_path: Path
) -> None:
    """Somebody takes memory after the plan was made: the ladder, on the node itself."""
    serving = Serving(
        children, cloud, tmp_path, "--pretend-taken", "900MiB", "--replicas", "1", model=MODEL
    )
    until(lambda: "ladder 1/3" in serving.child.stderr, why=lambda: serving.child.stderr)
    serving.wait(len(serving.engines()))
    # Killed outright, it takes its engines with it, on every node.
    serving.child.process.kill()
    until(lambda: nothing_left(cloud, serving))


def _named(serving: Serving, name: str) -> dict[str, object]:
    return next(one for one in serving.engines() if one["name"] == name)


def _actors(serving: Serving, node: str) -> list[int]:
    """The processes of a node's actors: their engines' parents' parents."""
    (found,) = [one for one in serving.status()["nodes"] if one["id"] == node]
    folders = [Path(engine["folder"]) for engine in found["engines"]]
    return [json.loads((folder / "run.json").read_text())["pid"] for folder in folders]


def test_two_gateways(cloud: Cloud, children: list[Child], tmp_path: Path) -> None:
    """A second one is told of engines as they come and go, and there is no place for a third."""
    serving = Serving(
        children, cloud, tmp_path, "--replicas", "1", "--tp", "1", "--gateways", "2", model=MODEL
    )
    engines = len(cloud.nodes)  # an earlier test may have killed one
    serving.wait(engines)
    second = serving.gateway(children)
    until(lambda: len(serving.status()["urls"]) == 2)
    third = serving.gateway(children)
    assert third.child.finish() == 2
    assert "hint: serve with a larger --gateways" in third.child.stderr
    until(lambda: second.health() == (200, engines, engines))
    with Clients(serving.port, 2) as one, Clients(second.port, 2) as other:
        one.more(3)
        other.more(3)
        code, told = serving.cli("drain", cloud.identity("one"))
        assert code == 0, told
        until(lambda: "its GPUs are given back" in serving.child.stderr)
        until(lambda: second.health() == (200, engines - 1, engines - 1))
        one.more(3)
        other.more(3)
    assert set(one.outcomes) == set(other.outcomes) == {"kept"}
    # What was served ends: so does a gateway that has nothing behind it any more.
    assert serving.end() == 0
    assert second.child.finish() == 5
    until(lambda: nothing_left(cloud, serving))
