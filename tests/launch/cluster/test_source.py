"""What `--cluster` may name, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tests.fixtures.clusters import cluster, node
from turbofit.core.cluster import Cluster, Node
from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.core.version import __version__
from turbofit.launch.cluster.nodes import cluster_from, held_only, measure_here, node_of
from turbofit.launch.cluster.ray_adapter import RayCallError, RayNode, ResultTimeoutError
from turbofit.machine.spec import parse_spec


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
        ("sim:1xl4@6000/1xl4@6000", "12,000 nodes"),
        ("sim:4xnosuchcard@2", "nosuchcard"),
        ("rays", "is no cluster"),
        ("4xrtx3090", "is no cluster"),
        ("nowhere.json", "cannot be read"),
        ("", "is no cluster"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        cluster_from(text)
    assert said in refused.value.message
    assert refused.value.hint


def test_a_file_is_read_as_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    saved = cluster("4xrtx3090", "1xl4")
    path.write_text(saved.to_json())
    found = cluster_from(str(path))
    assert found.nodes == saved.nodes
    assert found.source == f"a test ({path})"


def test_a_card_whose_memory_is_unknown_is_not_planned_with(tmp_path: Path) -> None:
    one, other = node(1, "2xrtx3090"), node(2, "1xl4")
    assert one.machine is not None
    assert other.machine is not None
    blind = replace(one.machine.gpus[1], total="NA", used="NA", free="NA", reserved="NA")
    one = replace(one, machine=replace(one.machine, gpus=(one.machine.gpus[0], blind), visible=()))
    lone = replace(other.machine.gpus[0], free="NA")
    other = replace(other, machine=replace(other.machine, gpus=(lone,)))
    path = tmp_path / "nodes.json"
    path.write_text(Cluster(source="", nodes=(one, other)).to_json())
    first, second = cluster_from(str(path)).nodes
    assert first.machine is not None
    assert first.machine.visible == (0,)
    assert second.machine is not None
    assert second.machine.visible == ()
    assert "could not be read" in second.why_not


def test_a_file_that_is_no_possible_cluster_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    document = json.loads(cluster("1xl4", "1xl4").to_json())

    def refused() -> str:
        path.write_text(json.dumps(document))
        with pytest.raises(UsageError) as error:
            cluster_from(str(path))
        return error.value.message

    document["nodes"][0]["id"] = document["nodes"][1]["id"]
    assert "two nodes have one id" in refused()
    document["nodes"][0]["id"] = "other"
    document["nodes"][0]["machine"]["gpus"][0]["total"] = -1
    assert "node host-1" in refused()
    document["schema"] = "turbofit.machine/1"
    assert "turbofit.machine/1" in refused()


@pytest.mark.parametrize(
    ("text", "address"), [("ray", None), ("ray:10.0.0.1:6379", "10.0.0.1:6379")]
)
def test_ray_is_asked_only_where_it_is_named(
    text: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[str | None] = []

    def measure_nodes(given: str | None) -> Cluster:
        addresses.append(given)
        return cluster("1xl4")

    monkeypatch.setattr("turbofit.launch.cluster.nodes.measure_nodes", measure_nodes)
    assert cluster_from(text) == cluster("1xl4")
    assert addresses == [address]


# What a node tells of itself, and which GPU Ray means.


def test_a_node_that_pretends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is asked to."""
    monkeypatch.setenv("TURBOFIT_NODE_SPEC", "2xrtx3090")
    node = msgspec.json.decode(measure_here(True), type=Node)
    assert node.machine is not None
    assert len(node.machine.gpus) == 2
    assert (node.pretend, node.turbofit, node.why_not) == (True, __version__, "")


def test_a_node_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a reason, and no machine."""
    monkeypatch.setenv("TURBOFIT_NODE_SPEC", "3xnosuchcard")
    node = msgspec.json.decode(measure_here(True), type=Node)
    assert node.machine is None
    assert "nosuchcard" in node.why_not


def test_why_a_node_says_nothing_is_told_in_words() -> None:
    here = RayNode(id="a", name="host", address="10.0.0.1", gpus=1)
    missing = RayCallError("ray::f\nModuleNotFoundError: No module named 'turbofit'")
    assert node_of(here, missing).why_not == "turbofit is not installed there"
    assert node_of(here, ResultTimeoutError("late")).why_not == "it did not answer within 120 s"
    assert "the node died" in node_of(here, RayCallError("the node died")).why_not
    assert "answers otherwise" in node_of(here, b'{"machine": 7}').why_not
    assert "no GPU" in node_of(here, None).why_not


def held(machine: Machine, *gpus: str) -> tuple[int, ...]:
    node = held_only(Node(id="a", name="a", address="", machine=machine), gpus)
    assert node.machine is not None
    return node.machine.visible


def test_a_node_is_planned_for_the_gpus_that_its_actor_has() -> None:
    """Ray names entries of CUDA_VISIBLE_DEVICES: indices or UUIDs."""
    machine = replace(parse_spec("4xrtx3090"), source="nvml")
    assert held(machine, "3", "0", machine.gpus[2].uuid) == (0, 2, 3)
    assert held(replace(machine, visible=(0, 1)), "1", "2") == (1,)
    with pytest.raises(UsageError):
        held(machine, "9")
    # A pretend machine may have fewer than Ray was told.
    assert held(parse_spec("2xrtx3090"), "0", "1", "2") == (0, 1)
