"""The schemas of clusters and their plans describe what is printed, and nothing else."""

from __future__ import annotations

import json

import pytest
from jsonschema import ValidationError

from tests.fixtures.clusters import cluster
from tests.report.schema.test_schema import check
from turbofit import api
from turbofit.core.cluster import Cluster, ClusterStatus, Node, NodeStatus
from turbofit.core.struct import to_json
from turbofit.report.schema import schema_path


def test_clusters() -> None:
    bare = Node(id="x", name="x", address="", why_not="no GPU")
    found = cluster("4xrtx3090", "1xl4,ram=64GiB")
    check("cluster", Cluster(source="", nodes=(*found.nodes, bare)).to_json())


@pytest.mark.parametrize(
    ("model", "specs"),
    [
        ("internvl2-8b", ("4xrtx3090", "2xrtx2080ti", "1xt4")),
        ("internvl2-76b", ("4xrtx3090",) * 4),
        ("internvl2-8b", ("1xt4",)),
        ("llava-onevision-7b", ("1xa100",)),
    ],
)
def test_plans(model: str, specs: tuple[str, ...]) -> None:
    text = api.plan_cluster(model, cluster(*specs)).to_json()
    check("cluster-plan", text)
    document = json.loads(text)
    document["nodes"][0]["new_field"] = 1
    with pytest.raises(ValidationError, match="new_field"):
        check("cluster-plan", json.dumps(document))


def test_what_is_served() -> None:
    nodes = (
        NodeStatus(id="a", name="a", address="10.0.0.1", state="serving", url="http://x", up=True),
        NodeStatus(id="b", name="b", address="10.0.0.2", state="unfit", why_not="no GPU"),
    )
    status = ClusterStatus(
        name="m", model="m", source="ray", pretend=False, at="2026-11-21T00:00:00+0000",
        urls=("http://127.0.0.1:23333",), promise="4,096 tokens a request", nodes=nodes,
    )  # fmt: skip
    check("cluster-status", to_json(status))
    assert schema_path("cluster-status").name == f"{status.schema.replace('/', '-')}.json"
