"""One engine over several nodes: only where no node serves, and on the safe side."""

from __future__ import annotations

import pytest

from tests.fixtures.clusters import cluster, node
from turbofit import api
from turbofit.core.cluster import Cluster
from turbofit.core.errors import UsageError
from turbofit.core.struct import known
from turbofit.core.units import GIB
from turbofit.tuner.cluster.spans import NETWORK

pytestmark = pytest.mark.slow


def test_nodes_are_joined_only_where_none_holds_the_model() -> None:
    whole = api.plan_cluster("internvl2-76b", cluster("8xh100", "4xrtx3090", "4xrtx3090"))
    assert whole.fits
    assert not whole.spans
    plan = api.plan_cluster("internvl2-76b", cluster(*["4xrtx3090"] * 5, "1xt4"))
    assert plan.fits
    (span,) = plan.spans
    assert len(span.nodes) * 4 == span.plan.parallel.tp == len(span.plan.gpus)
    assert span.plan.engine.name == "pytorch"
    assert span.plan.settings.distributed_executor_backend == "ray"
    assert plan.engines == 1
    assert plan.total_tokens == span.plan.kv.total_tokens
    assert span.at_once == span.plan.requests_at_once
    said = " ".join(plan.reasons)
    assert "slower" in said
    assert "network's speed is not known" in said
    assert "estimate" in said
    assert [bool(one.why_not) for one in plan.nodes] == [
        one.node not in span.nodes for one in plan.nodes
    ]
    assert not any(one.plan for one in plan.nodes)


def test_every_card_is_counted_as_full_as_the_fullest_with_an_allowance_on_both_sides() -> None:
    nodes = [node(k, "4xrtx3090", [0, 0, k * GIB // 2, 0]) for k in range(4)]
    plan = api.plan_cluster("internvl2-76b", Cluster(source="", nodes=tuple(nodes)))
    (span,) = plan.spans
    fullest = max(
        known(gpu.used, 0) for one in nodes if one.machine is not None for gpu in one.machine.gpus
    )
    lone = api.plan("internvl2-8b", on="4xrtx3090").gpus[0].margin
    for ledger in span.plan.gpus:
        assert ledger.used == fullest + NETWORK
        assert ledger.margin == lone + NETWORK
        assert ledger.fits
    for number, group in enumerate(span.groups):
        for other in span.groups[number + 1 :]:
            link = span.plan.machine.link(group[0], other[0])
            assert not link.peers
            assert not link.nvlinked


def test_one_command_where_ray_finds_the_gpus() -> None:
    """TurboMind would look for all ranks' GPUs on each node, for a model that sees images."""
    plan = api.plan_cluster("internvl2-76b", cluster(*["4xrtx3090"] * 4))
    (span,) = plan.spans
    (command,) = span.commands
    assert command.env["RAY_ADDRESS"] == "auto"
    assert "CUDA_VISIBLE_DEVICES" not in command.env
    words = dict(zip(command.argv, command.argv[1:], strict=False))
    assert (words["--backend"], words["--tp"]) == ("pytorch", "16")
    assert words["--distributed-executor-backend"] == "ray"
    assert "--nnodes" not in words
    assert any("engine pytorch: TurboMind" in reason for reason in plan.reasons)


def test_one_command_a_node_with_its_own_cards_and_rank() -> None:
    plan = api.plan_cluster(
        "internvl2-76b", cluster(*["4xrtx3090"] * 4), language_model_only=True, images=0
    )
    (span,) = plan.spans
    names = {one.id: one for one in cluster(*["4xrtx3090"] * 4).nodes}
    first = names[span.nodes[0]]
    for rank, (identity, command) in enumerate(zip(span.nodes, span.commands, strict=True)):
        machine = names[identity].machine
        assert machine is not None
        expected = ",".join(gpu.uuid for gpu in machine.gpus)
        assert command.env["CUDA_VISIBLE_DEVICES"] == expected
        words = dict(zip(command.argv, command.argv[1:], strict=False))
        assert words["--tp"] == "16"
        assert words["--nnodes"] == "4"
        assert words["--node-rank"] == str(rank)
        assert words["--dist-init-addr"] == f"{first.address}:29500"
        assert words["--communicator"] == "nccl"


def test_many_nodes_make_many_engines_under_one_promise() -> None:
    nodes = [node(k, "4xrtx3090", [k * GIB // 8] * 4) for k in range(9)]
    plan = api.plan_cluster("internvl2-76b", Cluster(source="", nodes=tuple(nodes)), concurrency=30)
    assert len(plan.spans) == 2
    assert len({identity for span in plan.spans for identity in span.nodes}) == 8
    lengths = {span.plan.settings.session_len for span in plan.spans}
    assert lengths == {plan.longest_request_tokens}
    assert sum(span.at_once for span in plan.spans) == pytest.approx(30)
    assert [one.name for one in plan.nodes if one.why_not] == ["host-8"]


@pytest.mark.parametrize(
    "asked",
    [
        {"engine": "turbomind"},
        {"communicator": "native", "language_model_only": True, "images": 0},
        {"distributed_executor_backend": "mp", "engine": "pytorch"},
        {"replicas": 2},
    ],
)
def test_what_lmdeploy_cannot_do_over_nodes_is_not_planned(asked: dict[str, object]) -> None:
    nodes = cluster(*["4xrtx3090"] * 4)
    plan = api.plan_cluster("internvl2-76b", nodes, **asked)  # type: ignore[arg-type]
    assert not plan.fits
    assert not plan.spans


def test_a_degree_that_no_nodes_make_is_refused() -> None:
    with pytest.raises(UsageError, match="--tp 16"):
        api.plan_cluster("internvl2-76b", cluster(*["4xrtx3090"] * 3), tp=16)


def test_a_degree_that_was_asked_for_is_the_only_one() -> None:
    plan = api.plan_cluster("internvl2-26b", cluster(*["1xrtx3090"] * 4), tp=4)
    (span,) = plan.spans
    assert span.plan.parallel.tp == 4
    assert len(span.nodes) == 4
