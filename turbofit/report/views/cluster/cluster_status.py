"""A cluster that serves, and a cluster's nodes, as something to read."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING

from turbofit.core.units import three_digits
from turbofit.report.painters.document import Column, FactList, Heading, Items, Paragraph, Table
from turbofit.tuner.cluster.cluster_plan import cards_of

if TYPE_CHECKING:
    from turbofit.core.cluster import Cluster, ClusterStatus
    from turbofit.report.painters.document import Block

__all__ = ["nodes_view", "status_view"]


def status_view(status: ClusterStatus) -> list[Block]:
    """What is served, node by node."""
    up = [node for node in status.nodes if node.up]
    blocks: list[Block] = [
        Heading(
            text=f"{status.name}: {len(up)} of {len(status.nodes)} nodes serve, {status.source}"
        ),
    ]
    if status.pretend:
        blocks.append(Paragraph(text="PRETEND GPUs: what is generated means nothing", tone="warn"))
    facts = [
        ("model", status.model),
        ("promise", status.promise),
        ("address", ", ".join(status.urls) or "none yet"),
        ("KV cache", f"{sum(node.tokens for node in up):,} tokens that serve"),
        ("under way", f"{sum(node.outstanding for node in status.nodes):,} requests"),
        ("as of", status.at),
    ]
    if status.change:
        facts.append(("change of plan", status.change))
    rows = tuple(
        (
            f"{node.name} ({node.id[:8]})",
            node.state if node.up or node.state != "serving" else "serving, down",
            f"{node.outstanding:,}",
            three_digits(node.at_once) if node.at_once else "-",
            f"{node.tokens:,}",
            shorten(node.why_not or node.said, 300, placeholder=" …"),
        )
        for node in status.nodes
    )
    names = ("node", "state", "requests", "at once", "KV tokens", "why, or said last")
    right = {"requests", "at once", "KV tokens"}
    wrapped = ("node", "state", "why, or said last")
    columns = tuple(Column(title=name, right=name in right, wrap=name in wrapped) for name in names)
    blocks += [FactList(facts=tuple(facts)), Table(columns=columns, rows=rows)]
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
    names = ("node", "id", "address", "GPUs", "LMDeploy", "why it cannot serve")
    wrapped = ("GPUs", "why it cannot serve")
    columns = tuple(Column(title=name, wrap=name in wrapped) for name in names)
    return [
        Heading(text=f"{len(cluster.nodes):,} nodes of {cluster.source}"),
        Table(columns=columns, rows=rows),
    ]
