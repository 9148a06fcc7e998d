"""A node that comes later is planned under the promise, or told in plain words why it is not."""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from tests.fixtures.clusters import cluster, joining, node
from turbofit import api
from turbofit.core.cluster import Cluster


def test_a_like_node_gets_the_same_settings() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "4xrtx3090"), concurrency=24)
    joined = joining(plan, node(3, "4xrtx3090"))
    first = plan.nodes[0].plan
    assert joined.plan is not None
    assert first is not None
    assert joined.at_once == 12
    assert joined.plan.settings.session_len == plan.longest_request_tokens
    assert joined.plan.limits.max_dynamic_patch == first.limits.max_dynamic_patch
    assert joined.plan.limits.n >= (plan.limits.n if plan.limits else 0)
    assert len(joined.plan.commands) == joined.plan.parallel.replicas
    assert joined.cards == "4x NVIDIA GeForce RTX 3090"
    assert joined.plan.throughput is not None


def test_a_context_that_is_too_short_is_told() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("8xh100"))
    joined = joining(plan, node(2, "2xrtx2080ti"))
    assert joined.plan is None
    assert "--context 32768: the cache holds 22528 tokens" in joined.why_not


def test_images_that_are_too_small_are_told() -> None:
    plan = api.plan_cluster("qwen2-vl-7b", cluster("8xh100"), context=17408)
    joined = joining(plan, node(2, "1xl4:free=19GiB"))
    assert joined.plan is None
    assert "runs out of memory while loading" in joined.why_not


def test_a_lower_promise_is_kept_by_a_node_that_could_more() -> None:
    plan = api.plan_cluster("qwen2-vl-7b", cluster("1xl4:free=19GiB"))
    joined = joining(plan, node(2, "2xa100"))
    assert plan.limits is not None
    assert joined.plan is not None
    assert joined.plan.limits.max_pixels_per_image == plan.limits.max_pixels_per_image
    assert joined.plan.settings.session_len == plan.longest_request_tokens


def test_answers_a_request_are_part_of_the_promise() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xrtx4090"), concurrency=12)
    assert plan.limits is not None
    assert plan.limits.n == 12
    joined = joining(plan, node(2, "1xrtx4090"))
    assert joined.plan is not None
    assert joined.plan.limits.n >= 12


def test_a_node_of_more_engines_has_the_promised_answers_on_each() -> None:
    plan = api.plan_cluster("internvl2-26b", cluster("2xa100-40g"))
    joined = joining(plan, node(2, "2xa100-80g"))
    assert plan.limits is not None
    assert joined.plan is not None
    assert joined.plan.parallel.replicas == 2
    assert joined.plan.limits.n == plan.limits.n


def test_settings_of_the_cluster_are_kept() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090"), session_len=8192)
    joined = joining(plan, node(2, "2xrtx3090"), session_len=8192)
    assert joined.plan is not None
    assert joined.plan.settings.session_len == 8192


def test_who_cannot_join_at_all() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090"))
    assert "turbofit 9" in joining(plan, node(2, "2xrtx3090", turbofit="9")).why_not
    assert "runs out of memory" in joining(plan, node(2, "1xt4")).why_not
    nothing = api.plan_cluster("internvl2-8b", Cluster(source="", nodes=()))
    assert "nothing is promised" in joining(nothing, node(2, "2xrtx3090")).why_not
    gone = replace(node(2, "2xrtx3090"), machine=None, why_not="no GPU")
    assert joining(plan, gone).why_not == "no GPU"


def test_a_node_of_the_plan_has_the_share_that_it_has_there() -> None:
    """It is planned again where the plan changes, and is no node more."""
    plan = api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "4xrtx3090"), concurrency=24)
    again = joining(plan, node(1, "4xrtx3090"))
    assert again.node == plan.nodes[0].node
    assert again.at_once == plan.nodes[0].at_once == 12


def test_a_node_that_holds_less_than_its_share_joins_where_that_is_no_promise() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xrtx4090"), concurrency=12)
    joined = joining(plan, node(2, "1xrtx3090:used=1GiB"))
    assert joined.plan is not None
    assert joined.plan.held is UNSET
