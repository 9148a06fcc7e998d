"""Several machines."""

from __future__ import annotations

from turbofit import api
from turbofit.core.cluster import NodeStatus
from turbofit.report.painters.document import Table
from turbofit.report.painters.terminal import paint
from turbofit.report.views.cluster_view import cluster_view, status_view
from turbofit.serving.cluster.actors import cluster_from


def test_a_thousand_nodes_read_as_well_as_three() -> None:
    cluster = cluster_from("sim:4xrtx3090@900/2xrtx4090@90/1xt4@10")
    many = api.plan_cluster("internvl2-8b", cluster, concurrency=4000)
    blocks = cluster_view(many)
    assert len(paint(blocks, width=100, colour=False).splitlines()) < 120
    kinds, left = (block for block in blocks if isinstance(block, Table) and block.whole)
    assert [row[0] for row in kinds.rows] == ["900", "90"]
    assert [row[0] for row in left.rows] == ["10"]
    assert kinds.rows[0][1] == "4x NVIDIA GeForce RTX 3090"
    assert kinds.rows[0][-1] == "sim-1, sim-2, sim-3 and 897 more"
    assert "runs out of memory" in left.rows[0][2]
    first = many.nodes[0].plan
    assert first is not None
    assert kinds.rows[0][4] == f"{first.kv_tokens:,}"


def test_what_is_served_node_by_node() -> None:
    nodes = [
        NodeStatus(
            serves="mine", id=f"{name}1", name=name, address="", cards="4x L4 (pretend)",
            state=state, tokens=1000 * (not why), at_once=12 * (not why), why_not=why,
        )
        for name, state, why in (
            ("a", "serving", ""), ("b", "unfit", "no room"), ("c", "draining", "")
        )
    ]  # fmt: skip
    text = paint(status_view(nodes), width=120, colour=False)
    for part in ("1 of 3 nodes serve", "(pretend)", "1,000", "12", "no room", "draining"):
        assert part in text


def test_eighty_columns_hold_what_a_node_said() -> None:
    said = "the engine ran out of GPU memory while it loaded weights, asking 2.0 GiB"
    node = NodeStatus(
        serves="InternVL2-8B", id="a" * 56, name="gpu-node-7.example", address="",
        state="starting", said=said, tokens=1_234_567,
    )  # fmt: skip
    assert max(map(len, paint(status_view([node])).splitlines())) <= 80
