"""The command lines of one engine over several nodes: LMDeploy's own multi-node options.

For TurboMind every node runs the same command with its own GPUs and rank; rank 0's node holds the
store at which they meet, and answers requests. The PyTorch engine is one command on one node of
Ray's cluster, and Ray gives it GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.planning.commands import commands, visible_devices

if TYPE_CHECKING:
    from turbofit.core.cluster import Cluster, Node, Span
    from turbofit.core.plan import Command

__all__ = ["MEETING_PORT", "span_commands"]

#: Where the ranks meet on rank 0's node: the port that torch's launchers use.
MEETING_PORT: Final = 29500
_NO_ADDRESS: Final = "ADDRESS-OF-RANK-0"


def span_commands(span: Span, cluster: Cluster, *, port: int = MEETING_PORT) -> tuple[Command, ...]:
    """One command a node, in the span's order; for the PyTorch engine that of the first node.

    Args:
        span: as planned.
        cluster: the nodes that it was planned for.
        port: a free one on rank 0's node.
    """
    nodes = {node.id: node for node in cluster.nodes}
    members = [nodes[identity] for identity in span.nodes]
    (whole,) = commands(span.plan)
    if span.plan.engine.is_pytorch:
        # The engine's own process is no rank: CUDA_VISIBLE_DEVICES would hide nothing but its node.
        env = {n: value for n, value in whole.env.items() if n != "CUDA_VISIBLE_DEVICES"}
        return (replace(whole, env={**env, "RAY_ADDRESS": "auto"}),)
    address = members[0].address or _NO_ADDRESS
    made = []
    for rank, (node, group) in enumerate(zip(members, span.groups, strict=True)):
        options = (
            "--nnodes", str(len(members)), "--node-rank", str(rank),
            "--dist-init-addr", f"{address}:{port}",
        )  # fmt: skip
        env = {**whole.env, "CUDA_VISIBLE_DEVICES": _devices(span, node, group)}
        made.append(replace(whole, env=env, argv=(*whole.argv, *options)))
    return tuple(made)


def _devices(span: Span, node: Node, group: tuple[int, ...]) -> str:
    """The node's own GPUs of the engine."""
    assert node.machine is not None
    wanted = {span.plan.machine.gpu(index).uuid for index in group}
    indices = tuple(gpu.index for gpu in node.machine.gpus if gpu.uuid in wanted)
    return visible_devices(node.machine, indices)
