"""A cluster's plan as a document: the promise, the nodes folded by what they run, who is left out.

Nodes with equal cards and equal settings are one row, so that a thousand read as well as three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import groups_of, plural
from turbofit.core.units import three_digits
from turbofit.report.painters.document import (
    Code,
    Column,
    FactList,
    Heading,
    Items,
    Paragraph,
    Table,
)
from turbofit.report.shell import shell_words
from turbofit.report.views.plan.plan_summary import speed_in_short
from turbofit.report.views.plan.remedies_table import remedies_table
from turbofit.report.views.summary_lines import first_warnings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.cluster import ClusterPlan, NodePlan
    from turbofit.core.plan import Plan
    from turbofit.report.painters.document import Block

__all__ = ["cluster_summary", "cluster_view"]

#: Names of a row's nodes that are written out.
_NAMES: Final = 3
_BASED: Final = (
    "max_prefill_token_num", "max_batch_size", "cache_max_entry_count", "dtype", "communicator",
)  # fmt: skip

#: Remedies and kinds of nodes of the summary; the whole text has all.
_REMEDIES: Final = 3
_KINDS: Final = 4

#: What remedies are, by whether the plan fits.
_REMEDY_TITLES: Final = {True: "What another promise would give", False: "What would fit"}


def cluster_view(plan: ClusterPlan) -> list[Block]:
    """The whole plan."""
    where = f" ({plan.source})" if plan.source else ""
    blocks: list[Block] = [
        Heading(text=f"{plan.model.name} on {_count_of(plan.nodes)}{where}"),
        Paragraph(text=plan.verdict, tone="good" if plan.fits else "bad"),
    ]
    blocks += _simulated_note(plan)
    if not plan.fits:
        blocks += remedies_table(plan.remedies, _REMEDY_TITLES[plan.fits])
    if plan.warnings:
        blocks += [Heading(text="Warnings"), Items(items=plan.warnings, tone="warn")]
    if plan.fits:
        blocks += [Heading(text="What is promised"), _promise(plan)]
    if plan.reasons:
        blocks += [Heading(text="Why"), Items(items=plan.reasons)]
    folded = _folded_nodes(plan.nodes)
    if folded:
        blocks += [Heading(text="Nodes that serve, by kind"), _nodes_table(folded)]
        blocks += [Heading(text="Settings, by kind"), _settings(folded)]
    blocks += _left_out(plan)
    if plan.fits:
        blocks += remedies_table(plan.remedies, _REMEDY_TITLES[plan.fits])
    return [*blocks, *_serve_blocks(plan)]


def cluster_summary(plan: ClusterPlan) -> list[Block]:
    """The verdict, the promise, the nodes by kind, a warning, and where there is more."""
    blocks: list[Block] = [
        Heading(text=f"{plan.model.name} on {_count_of(plan.nodes)}"),
        Paragraph(text=plan.verdict, tone="good" if plan.fits else "bad"),
        *_simulated_note(plan),
    ]
    if plan.fits:
        blocks.append(_promise(plan, short=True))
    folded = _folded_nodes(plan.nodes)
    if folded:
        blocks.append(_nodes_table(folded[:_KINDS]))
    blocks += remedies_table(plan.remedies[:_REMEDIES], _REMEDY_TITLES[plan.fits])
    # Where it fits, the verdict counts the nodes that are left out, and a warning says why.
    blocks += first_warnings(plan.warnings) if plan.fits else _left_out(plan)
    blocks += _serve_blocks(plan)
    rest = len(folded) - _KINDS
    kinds = f", {rest} more {plural(rest, 'kind')} of nodes among it" if rest > 0 else ""
    more = f"more: --full (settings of each kind{kinds}), --md or --json"
    return [*blocks, Paragraph(text=more, tone="dim")]


def _count_of(nodes: Sequence[NodePlan]) -> str:
    """So many nodes, in words."""
    return f"{len(nodes):,} {plural(len(nodes), 'node')}"


def _serve_blocks(plan: ClusterPlan) -> list[Block]:
    """What serves it, to be run on any node."""
    if plan.serve is None:
        return []
    text = "on a node of the Ray cluster:"
    return [Paragraph(text=text, tone="dim"), Code(text=shell_words(plan.serve.argv))]


def _simulated_note(plan: ClusterPlan) -> list[Block]:
    """That nothing was measured, where nothing was."""
    if not plan.source.startswith("simulated"):
        return []
    text = "simulated: no such machine was measured, all figures are of presets"
    return [Paragraph(text=text, tone="warn")]


def _promise(plan: ClusterPlan, *, short: bool = False) -> FactList:
    """What requests are held to on any node, and what all nodes do together."""
    limits = plan.limits
    assert limits is not None
    facts = [("context", f"{plan.longest_request_tokens:,} tokens with the answer")]
    if limits.vision_unit is not None:
        unit = plural(limits.units_per_image, limits.vision_unit)
        text = f"at most {limits.units_per_image:,} {unit} each"
        facts.append(("images", f"{limits.images_per_request} a request, {text}"))
    if not short and limits.max_dynamic_patch is not None:
        facts.append(("max_dynamic_patch", str(limits.max_dynamic_patch)))
    if not short and limits.max_pixels_per_image is not None:
        facts.append(("max_pixels", f"{limits.max_pixels_per_image:,} an image"))
    if not short:
        engines = f"{plan.engines:,} {plural(plan.engines, 'engine')}"
        facts.append(("answers a request", f"{limits.n} at most (n)"))
        facts.append(("KV caches", f"{plan.total_tokens:,} tokens in {engines}"))
    facts.append(("requests", f"{plan.requests_at_once:,} at once over all nodes"))
    if plan.throughput is not None:
        facts.append(("forecast", speed_in_short(plan.throughput, plan.model)))
    return FactList(facts=tuple(facts))


def _folded_nodes(nodes: Iterable[NodePlan]) -> list[list[NodePlan]]:
    """Nodes that serve, by their cards, groups and settings; the most nodes first."""
    found: dict[object, list[NodePlan]] = {}
    for node in nodes:
        if node.plan is not None:
            plan = node.plan
            each = tuple(one.settings for one in plan.by_group)
            key = (node.cards, plan.engine, plan.parallel.groups, plan.settings, each)
            found.setdefault(key, []).append(node)
    return sorted(found.values(), key=len, reverse=True)


def _nodes_table(folded: Sequence[Sequence[NodePlan]]) -> Table:
    """What each kind of node runs, and how many there are."""
    rows = []
    for members in folded:
        plans = _plans(members)
        first = plans[0]
        tokens = [plan.kv.total_tokens for plan in plans]
        rates = [p.throughput.requests_per_second for p in plans if p.throughput is not None]
        rows.append(
            (
                f"{len(members):,}",
                members[0].cards,
                first.engine.name,
                f"{first.parallel.tp}x{first.parallel.replicas}",
                _span_of(tokens),
                three_digits(rates[0]) if rates else "-",
                three_digits(members[0].at_once),
                _names(members),
            )
        )
    columns = (
        Column(title="nodes", right=True),
        Column(title="cards", wrap=True),
        Column(title="engine"),
        Column(title="tp x n", right=True),
        Column(title="KV tokens", right=True),
        Column(title="req/s", right=True),
        Column(title="at once", right=True),
        Column(title="which", wrap=True),
    )
    return Table(columns=columns, rows=tuple(rows))


def _settings(folded: Sequence[Sequence[NodePlan]]) -> Table:
    rows = []
    for members in folded:
        plan = _plans(members)[0]
        each = [one.settings for one in plan.by_group] or [plan.settings]
        cells = []
        for name in _BASED:
            values = {getattr(one, name) for one in each}
            cells.append("-".join(map(str, sorted({min(values), max(values)}))))
        rows.append((f"{len(members):,}", groups_of(plan.parallel.groups), *cells))
    columns = (
        Column(title="nodes", right=True),
        Column(title="GPUs", wrap=True),
        Column(title="prefill", right=True),
        Column(title="batch", right=True),
        Column(title="cache ratio", right=True),
        Column(title="dtype"),
        Column(title="communicator"),
    )
    return Table(columns=columns, rows=tuple(rows))


def _left_out(plan: ClusterPlan) -> list[Block]:
    """Nodes that serve nothing, by their cards and reason."""
    found: dict[tuple[str, str], list[NodePlan]] = {}
    for node in plan.nodes:
        if node.plan is None and node.why_not:
            found.setdefault((node.cards, node.why_not), []).append(node)
    if not found:
        return []
    rows = tuple(
        (f"{len(members):,}", cards or "-", why, _names(members))
        for (cards, why), members in sorted(found.items(), key=lambda pair: -len(pair[1]))
    )
    columns = (
        Column(title="nodes", right=True),
        Column(title="cards", wrap=True),
        Column(title="why", wrap=True),
        Column(title="which", wrap=True),
    )
    return [Heading(text="Nodes that serve nothing"), Table(columns=columns, rows=rows)]


def _plans(members: Iterable[NodePlan]) -> list[Plan]:
    return [node.plan for node in members if node.plan is not None]


def _names(members: Sequence[NodePlan]) -> str:
    names = ", ".join(node.name for node in members[:_NAMES])
    more = len(members) - _NAMES
    return names if more <= 0 else f"{names} and {more:,} more"


def _span_of(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
