"""A cluster's plan in about twenty lines: what all nodes serve together, which serve nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.report.painters.document import FactList, Heading, Paragraph
from turbofit.report.views.cluster.cluster_view import (
    REMEDY_TITLES,
    count_of,
    folded_nodes,
    left_out,
    nodes_table,
    serve_blocks,
    simulated_note,
)
from turbofit.report.views.plan.plan_summary import speed_in_short
from turbofit.report.views.plan.remedies_table import remedies_table
from turbofit.report.views.summary_lines import first_warnings

if TYPE_CHECKING:
    from turbofit.core.cluster import ClusterPlan
    from turbofit.report.painters.document import Block

__all__ = ["cluster_summary"]

#: Remedies and kinds of nodes that are shown; the whole text has all.
_REMEDIES: Final = 3
_KINDS: Final = 4


def cluster_summary(plan: ClusterPlan) -> list[Block]:
    """The verdict, the promise, the nodes by kind, a warning, and where there is more."""
    blocks: list[Block] = [
        Heading(text=f"{plan.model.name} on {count_of(plan.nodes)}"),
        Paragraph(text=plan.verdict, tone="good" if plan.fits else "bad"),
        *simulated_note(plan),
    ]
    if plan.fits:
        blocks.append(FactList(facts=tuple(_promise(plan))))
    folded = folded_nodes(plan.nodes)
    if folded:
        blocks.append(nodes_table(folded[:_KINDS]))
    blocks += [
        Paragraph(text=f"one engine over {len(span.nodes)} nodes: {span.plan.verdict}")
        for span in plan.spans
    ]
    blocks += remedies_table(plan.remedies[:_REMEDIES], REMEDY_TITLES[plan.fits])
    # Where it fits, the verdict counts the nodes that are left out, and a warning says why.
    blocks += first_warnings(plan.warnings) if plan.fits else left_out(plan)
    blocks += serve_blocks(plan)
    rest = len(folded) - _KINDS
    kinds = f", {rest} more {plural(rest, 'kind')} of nodes among it" if rest > 0 else ""
    more = f"more: --full (settings and commands of each kind{kinds}), --md or --json"
    return [*blocks, Paragraph(text=more, tone="dim")]


def _promise(plan: ClusterPlan) -> list[tuple[str, str]]:
    """What requests are held to on any node, and what all nodes do together."""
    limits = plan.limits
    facts = [("context", f"{plan.longest_request_tokens:,} tokens with the answer")]
    if limits is not None and limits.vision_unit is not None:
        unit = plural(limits.units_per_image, limits.vision_unit)
        text = (
            f"{limits.images_per_request} a request, at most {limits.units_per_image:,} {unit} each"
        )
        facts.append(("images", text))
    facts.append(("requests", f"{plan.requests_at_once:,} at once over all nodes"))
    if plan.throughput is not None:
        facts.append(("speed", speed_in_short(plan.throughput)))
    return facts
