"""What a node tells of itself, and which GPU Ray means."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.errors import UsageError
from turbofit.core.version import __version__
from turbofit.launch.cluster.nodes import NODE_SPEC, held_only, index_of, measure_here, only
from turbofit.machine.spec import parse_spec


def test_a_node_that_pretends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is asked to."""
    monkeypatch.setenv(NODE_SPEC, "2xrtx3090")
    node = msgspec.json.decode(measure_here(True), type=Node)
    assert node.machine is not None
    assert [gpu.name for gpu in node.machine.gpus] == ["RTX 3090"] * 2 or len(
        node.machine.gpus
    ) == 2
    assert (node.pretend, node.turbofit, node.why_not) == (True, __version__, "")


def test_a_node_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a reason, and no machine."""
    monkeypatch.setenv(NODE_SPEC, "3xnosuchcard")
    node = msgspec.json.decode(measure_here(True), type=Node)
    assert node.machine is None
    assert "nosuchcard" in node.why_not


def test_which_gpu_is_meant() -> None:
    """Ray names entries of CUDA_VISIBLE_DEVICES: indices or UUIDs."""
    machine = replace(parse_spec("4xrtx3090"), source="nvml")
    uuid = machine.gpus[2].uuid
    assert index_of(machine, ["3", "0", uuid]) == {"3": 3, "0": 0, uuid: 2}
    assert only(machine, ["3", "1"]).visible == (1, 3)
    hidden = replace(machine, visible=(0, 1))
    assert index_of(hidden, ["1", "2"]) == {"1": 1}
    with pytest.raises(UsageError):
        index_of(machine, ["9"])


def test_a_pretend_node_may_have_fewer_than_ray_counts() -> None:
    """They are not there to serve with."""
    assert index_of(parse_spec("2xrtx3090"), ["0", "1", "2"]) == {"0": 0, "1": 1}


def test_a_node_whose_gpus_others_hold() -> None:
    """It is left out, with the reason."""
    node = Node(id="a", name="a", address="", machine=parse_spec("2xrtx3090"))
    assert held_only(node, ()).machine is None
    assert "jobs of Ray hold them all" in held_only(node, ()).why_not
    kept = held_only(node, ("1",)).machine
    assert kept is not None
    assert kept.visible == (1,)
