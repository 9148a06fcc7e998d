"""A cluster's plan on paper: folded by kind, in full where it matters."""

from __future__ import annotations

import pytest

from turbofit import api
from turbofit.core.cluster import ClusterPlan
from turbofit.launch.cluster.nodes import cluster_from
from turbofit.report.painters import markdown
from turbofit.report.painters.document import Code, Heading, Table
from turbofit.report.painters.terminal import paint
from turbofit.report.views.cluster_view import cluster_view


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


def test_what_does_not_fit_begins_with_what_would() -> None:
    blocks = cluster_view(planned("sim:1xt4"))
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    assert headings[1] == "What would fit"
    assert "What is promised" not in headings


def test_a_plan_without_images_or_forecast() -> None:
    text = markdown.paint(cluster_view(planned("sim:1xa100@2", "llava-onevision-7b")))
    assert "transformers" in text
    assert "forecast" not in text
    plain = markdown.paint(cluster_view(planned("sim:1xa100@2", "internlm2.5-7b")))
    assert "max_dynamic_patch" not in plain


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
