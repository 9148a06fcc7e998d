"""A cluster's plan on paper: folded by kind, in full where it matters."""

from __future__ import annotations

import pytest

from turbofit import api
from turbofit.core.cluster import ClusterPlan
from turbofit.launch.cluster.nodes import cluster_from
from turbofit.report.painters.document import Code, Table
from turbofit.report.painters.terminal import paint
from turbofit.report.views.several_view import cluster_view


def planned(spec: str, model: str = "internvl2-8b", **asked: int) -> ClusterPlan:
    return api.plan_cluster(model, cluster_from(spec), **asked)  # type: ignore[arg-type]


def tables(plan: ClusterPlan) -> list[Table]:
    return [block for block in cluster_view(plan) if isinstance(block, Table) and block.whole]


def test_a_thousand_nodes_read_as_well_as_three() -> None:
    many = planned("sim:4xrtx3090@900/2xrtx4090@90/1xt4@10", concurrency=4000)
    text = paint(cluster_view(many), width=100, colour=False)
    assert len(text.splitlines()) < 120
    kinds, settings, left = tables(many)
    assert [row[0] for row in kinds.rows] == ["900", "90"]
    assert [row[0] for row in settings.rows] == ["900", "90"]
    assert [row[0] for row in left.rows] == ["10"]
    assert kinds.rows[0][1] == "4x NVIDIA GeForce RTX 3090"
    assert kinds.rows[0][-1] == "sim-1, sim-2, sim-3 and 897 more"
    assert "runs out of memory" in left.rows[0][2]
    first = many.nodes[0].plan
    assert first is not None
    assert kinds.rows[0][4] == f"{first.kv.total_tokens:,}"


def test_it_ends_with_what_serves_it() -> None:
    (serve,) = (
        block.text
        for block in cluster_view(planned("sim:4xrtx3090@2", concurrency=64))
        if isinstance(block, Code)
    )
    assert serve.startswith("turbofit serve internvl2-8b")
    assert serve.endswith("--cluster ray")


def test_settings_of_unequal_cards_are_a_range_of_numbers() -> None:
    plan = planned("sim:1xrtx3090+1xa100-80g@2", "internvl2-2b", concurrency=60)
    batch = tables(plan)[1].rows[0][3]
    least, most = map(int, batch.split("-"))
    assert least < most


def lines(plan: ClusterPlan) -> list[str]:
    return paint(cluster_view(plan), short=True).splitlines()


@pytest.mark.parametrize(
    ("spec", "concurrency"),
    [("sim:4xrtx3090@2/1xl4", 40), ("sim:4xrtx3090@900/2xrtx4090@90/1xt4@10", 4000)],
)
def test_it_has_the_promise_and_the_kinds_of_nodes(spec: str, concurrency: int) -> None:
    plan = planned(spec, concurrency=concurrency)
    said = lines(plan)
    assert len(said) <= 25
    assert max(map(len, said)) <= 80
    text = " ".join(" ".join(said).split())
    assert plan.verdict in text
    assert f"{plan.longest_request_tokens:,} tokens with the answer" in text
    assert f"{plan.requests_at_once:,} at once over all nodes" in text
    assert "simulated: no such machine was measured" in text
    assert "--full" in said[-1]
