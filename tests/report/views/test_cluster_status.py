"""A cluster that serves, on paper."""

from __future__ import annotations

from tests.fixtures.clusters import cluster
from turbofit.core.cluster import Cluster, ClusterStatus, Node, NodeStatus
from turbofit.report.painters.terminal import paint
from turbofit.report.views.several_view import nodes_view, status_view


def test_what_is_served_node_by_node() -> None:
    status = ClusterStatus(
        name="mine", model="InternVL2-8B", source="ray 10.0.0.1:6379", pretend=True, at="now",
        urls=("http://10.0.0.1:23333",), promise="4,096 tokens a request", change="1 of 2 nodes",
        nodes=(
            NodeStatus(
                id="a" * 56, name="a", address="", state="serving", up=True, outstanding=7,
                tokens=1000, at_once=12.0,
            ),
            NodeStatus(id="b" * 56, name="b", address="", state="unfit", why_not="no room"),
            NodeStatus(id="c" * 56, name="c", address="", state="serving", tokens=1000),
        ),
        events=("12:00:00 node b joined",),
    )  # fmt: skip
    text = paint(status_view(status), width=120, colour=False)
    assert "mine: 1 of 3 nodes serve" in text
    assert "PRETEND" in text
    assert "1,000 tokens that serve" in text
    assert "7 requests" in text
    assert "serving, down" in text
    assert "no room" in text
    assert "1 of 2 nodes" in text
    assert "node b joined" in text


def test_nodes_as_they_were_measured() -> None:
    bare = Node(id="0123456789", name="head", address="10.0.0.1", why_not="Ray counts no GPU there")
    found = Cluster(source="ray 10.0.0.1:6379", nodes=(*cluster("2xrtx3090").nodes, bare))
    text = paint(nodes_view(found), width=120, colour=False)
    assert "2 nodes of ray 10.0.0.1:6379" in text
    assert "2x NVIDIA GeForce RTX 3090" in text
    assert "Ray counts no GPU there" in text


def test_eighty_columns_hold_what_a_node_said_and_why_a_node_cannot_serve() -> None:
    said = "the engine ran out of GPU memory while it loaded weights, asking 2.0 GiB"
    node = NodeStatus(
        id="a" * 56, name="gpu-node-7.example", address="", state="starting", said=said,
        tokens=1_234_567,
    )  # fmt: skip
    status = ClusterStatus(
        name="mine", model="InternVL2-8B", source="ray", pretend=False, at="now", urls=(),
        promise="x", nodes=(node,),
    )  # fmt: skip
    other = "its LMDeploy 0.17.1 is another than the 0.18.0 of the node that plans"
    bare = Node(id="0123456789", name="head.example", address="10.0.0.100", why_not=other)
    found = Cluster(source="ray", nodes=(*cluster("4xrtx3090").nodes, bare))
    for blocks in (status_view(status), nodes_view(found)):
        assert max(map(len, paint(blocks).splitlines())) <= 80
