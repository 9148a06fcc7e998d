"""A cluster that serves, and a cluster's nodes, as something to read."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING

from turbofit.report.painters.document import Column, FactList, Heading, Items, Paragraph, Table
from turbofit.tuner.cluster.messages import cards_of

if TYPE_CHECKING:
    from turbofit.core.cluster import Cluster, ClusterStatus, NodeStatus
    from turbofit.report.painters.document import Block

__all__ = ["nodes_view", "status_view"]


def status_view(status: ClusterStatus) -> list[Block]:
    """What is served, node by node."""
    engines = [engine for node in status.nodes for engine in node.engines]
    up = sum(engine.up for engine in engines)
    blocks: list[Block] = [
        Heading(text=f"{status.name}: {up} of {len(engines)} engines serve, {status.source}"),
    ]
    if status.pretend:
        blocks.append(Paragraph(text="PRETEND GPUs: what is generated means nothing", tone="warn"))
    facts = [
        ("model", status.model),
        ("promise", status.promise),
        ("gateways", ", ".join(status.urls) or "none yet"),
        (
            "KV cache",
            f"{sum(engine.tokens for engine in engines if engine.up):,} tokens that serve",
        ),
        ("under way", f"{sum(engine.outstanding for engine in engines):,} requests"),
        ("as of", status.at),
    ]
    if status.change:
        facts.append(("change of plan", status.change))
    blocks += [FactList(facts=tuple(facts)), _engines(status.nodes)]
    idle = tuple(
        f"{node.name} ({node.id[:8]}): {node.state}{f', {node.why_not}' if node.why_not else ''}"
        for node in status.nodes
        if not node.engines
    )
    if idle:
        blocks += [Heading(text="Nodes without engines"), Items(items=idle)]
    said = tuple(
        f"{engine.name}: {text}"
        for engine in engines
        for text in (*((engine.error,) if engine.error else ()), *engine.warnings)
    )
    if said:
        blocks += [Heading(text="Warnings"), Items(items=said, tone="warn")]
    if status.events:
        blocks += [Heading(text="What happened"), Items(items=status.events)]
    return blocks


def nodes_view(cluster: Cluster) -> list[Block]:
    """The nodes as they were measured."""
    rows = tuple(
        (
            node.name,
            node.id[:8],
            node.address,
            cards_of(node.machine),
            node.lmdeploy or "none",
            node.why_not or ("pretend" if node.pretend else ""),
        )
        for node in cluster.nodes
    )
    return [
        Heading(text=f"{len(cluster.nodes):,} nodes of {cluster.source}"),
        Table(
            columns=tuple(
                Column(title=name, wrap=name in ("GPUs", "why it cannot serve"))
                for name in ("node", "id", "address", "GPUs", "LMDeploy", "why it cannot serve")
            ),
            rows=rows,
        ),
    ]


def _engines(nodes: tuple[NodeStatus, ...]) -> Table:
    rows = tuple(
        (
            f"{node.name} ({node.id[:8]})",
            ",".join(map(str, engine.gpus)),
            engine.state if engine.up or engine.state != "ready" else "ready, down",
            f"{engine.outstanding:,}",
            f"{engine.tokens:,}",
            f"{engine.restarts:,}",
            shorten(engine.said, 60, placeholder=" …"),
        )
        for node in nodes
        for engine in node.engines
    )
    names = ("node", "GPUs", "engine", "requests", "KV tokens", "restarts", "said last")
    right = {"requests", "KV tokens", "restarts"}
    wrapped = ("node", "said last")
    columns = tuple(Column(title=name, right=name in right, wrap=name in wrapped) for name in names)
    return Table(columns=columns, rows=rows)
