"""A cluster's plan in short: it fits a terminal of 80 x 24, however many nodes there are."""

from __future__ import annotations

import pytest

from tests.report.views.cluster.test_cluster_view import planned
from turbofit.core.cluster import ClusterPlan
from turbofit.report.painters.terminal import paint
from turbofit.report.views.cluster.cluster_summary import cluster_summary


def lines(plan: ClusterPlan) -> list[str]:
    return paint(cluster_summary(plan), width=80, colour=False).splitlines()


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


def test_where_none_serves_the_nodes_say_why_and_what_would_fit() -> None:
    plan = planned("sim:1xt4@3", "internvl2-26b")
    text = " ".join(" ".join(lines(plan)).split())
    assert not plan.fits
    assert "Nodes that serve nothing" in text
    assert plan.remedies[0].change in text


def test_kinds_beyond_four_are_counted() -> None:
    cards = ("rtx3090", "rtx4090", "l4", "a10", "l40s", "a100-80g")
    said = lines(planned("sim:" + "/".join(f"1x{card}" for card in cards)))
    assert "2 more kinds of nodes among it" in " ".join(said)
