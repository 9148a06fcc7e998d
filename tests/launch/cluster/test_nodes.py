"""What a node tells of itself, and which GPU Ray means."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.core.version import __version__
from turbofit.launch.cluster.nodes import held_only, measure_here, node_of
from turbofit.launch.cluster.ray_adapter import RayCallError, RayNode, ResultTimeoutError
from turbofit.machine.spec import parse_spec


def test_a_node_that_pretends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is asked to."""
    monkeypatch.setenv("TURBOFIT_NODE_SPEC", "2xrtx3090")
    node = msgspec.json.decode(measure_here(True), type=Node)
    assert node.machine is not None
    assert [gpu.name for gpu in node.machine.gpus] == ["RTX 3090"] * 2 or len(
        node.machine.gpus
    ) == 2
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
