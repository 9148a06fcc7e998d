"""What `--cluster` may name, and what a node tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.fixtures.clusters import node
from turbofit.core.cluster import Node
from turbofit.core.errors import UsageError
from turbofit.core.units import GIB
from turbofit.core.version import REFERENCE, __version__
from turbofit.machine.source import save_snapshot
from turbofit.machine.spec import parse_spec
from turbofit.serving.cluster import ray_adapter
from turbofit.serving.cluster.actors import cluster_from, measure_here, measured
from turbofit.serving.engine import lmdeploy


def test_simulated_machines_are_described_and_say_so() -> None:
    found = cluster_from("sim:4xrtx3090@3/8xh100,ram=512GiB@2/1xl4:free=19GiB")
    assert found.source == (
        "simulated: 3 of 4xrtx3090, 2 of 8xh100,ram=512GiB, 1 of 1xl4:free=19GiB"
    )
    assert [len(one.machine.gpus) for one in found.nodes if one.machine] == [4, 4, 4, 8, 8, 1]
    assert [one.id for one in found.nodes] == [f"sim-{number}" for number in range(1, 7)]


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
        ("sim:./node.json@2", "SPEC@COUNT"),
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


def test_nodes_are_measured_where_they_may_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node has as many of its GPUs as Ray counts."""
    asked: list[str] = []
    four = Node(id="", name="", address="", machine=parse_spec("4xrtx3090"))
    answers = {"a": four, "b": replace(four, machine=None, why_not="no driver"), "c": OSError("x")}

    def run_on(identity: str, function: Callable[..., Node], version: str) -> str:
        assert (function, version) == (measure_here, __version__)
        asked.append(identity)
        return identity

    def outcomes(tasks: Sequence[str], _: float) -> list[Any]:
        return [answers[task] for task in tasks]

    monkeypatch.setattr(ray_adapter, "run_on", run_on)
    monkeypatch.setattr(ray_adapter, "outcomes", outcomes)
    nodes = [Node(id=name, name=name, address="", gpus=2) for name in "abc"]
    held = replace(nodes[0], id="d", why_not="held")
    a, b, c, d = measured([*nodes, held])
    assert asked == ["a", "b", "c"]
    assert a.machine is not None
    assert (a.id, a.machine.visible, len(a.machine.gpus)) == ("a", (0, 1), 4)
    assert (b.why_not, c.why_not) == ("no driver", "it could not be measured: x")
    assert d == held


def test_a_node_that_cannot_be_planned_for_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    with monkeypatch.context() as readonly:
        readonly.setenv("XDG_STATE_HOME", str(file))
        told = measure_here(__version__).why_not
    assert told == "the state folder cannot be written: Not a directory"
    monkeypatch.setenv("TURBOFIT_NODE_SPEC", "3xnosuchcard")
    assert "nosuchcard" in measure_here(__version__).why_not
    assert measure_here("0.0.1").why_not.startswith(f"it has turbofit {__version__}, not 0.0.1")
    other = lmdeploy.Lmdeploy(argv=(), version="0.12.1")
    monkeypatch.setattr(lmdeploy, "find_lmdeploy", lambda: other)
    told = measure_here(__version__).why_not
    assert told == f"it has LMDeploy 0.12.1, plans are for {REFERENCE}"
