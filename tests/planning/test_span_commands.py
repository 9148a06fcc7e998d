"""Commands of an engine over nodes, for nodes that are described and for ones without address."""

from __future__ import annotations

from turbofit import api
from turbofit.launch.cluster.source import cluster_from
from turbofit.planning.span_commands import MEETING_PORT, span_commands


def test_described_nodes_have_indices_and_no_address() -> None:
    cluster = cluster_from("sim:4xrtx3090@4")
    plan = api.plan_cluster("internvl2-76b", cluster, language_model_only=True, images=0)
    (span,) = plan.spans
    for command in span.commands:
        assert command.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
        assert f"ADDRESS-OF-RANK-0:{MEETING_PORT}" in command.argv


def test_the_meeting_port_can_be_another() -> None:
    cluster = cluster_from("sim:4xrtx3090@4")
    plan = api.plan_cluster("internvl2-76b", cluster, language_model_only=True, images=0)
    made = span_commands(plan.spans[0], cluster, port=31000)
    assert all("ADDRESS-OF-RANK-0:31000" in command.argv for command in made)
    assert [command.argv[command.argv.index("--node-rank") + 1] for command in made] == [
        "0", "1", "2", "3",
    ]  # fmt: skip
