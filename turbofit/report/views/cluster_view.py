"""A cluster as a document; nodes with equal cards and settings share a row."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.messages import plural
from turbofit.core.units import three_digits
from turbofit.report.painters.document import (
    ONLY_SHORT,
    Code,
    Heading,
    Items,
    Paragraph,
    Table,
    Verdict,
    known_facts,
    listed,
    remark,
    remedies_table,
    table,
)
from turbofit.report.views.figures import shell_words
from turbofit.report.views.plan_view import speed_in_short

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.cluster import ClusterPlan, ClusterStatus, NodePlan
    from turbofit.core.plan import Plan
    from turbofit.report.painters.document import Block


#: The number of node names that a row lists.
_NAMES: Final = 3
#: Remedies and kinds of nodes in the short text; the whole text lists all.
_REMEDIES: Final = 3
_KINDS: Final = 4
#: Columns of numbers, and columns whose text may be broken over lines.
_RIGHT: Final = ("nodes", "tp x n", "KV tokens", "req/s", "at once", "requests")
_WRAPPED: Final = ("cards", "which", "why", "node", "state", "why, or said last")


def _table(names: Sequence[str], rows: Iterable[tuple[str, ...]], **places: Any) -> Table:
    return table(names, rows, right=_RIGHT, wrap=_WRAPPED, **places)


def cluster_view(plan: ClusterPlan) -> list[Block]:
    """The verdict, the promise, the kinds of nodes, the nodes that are left out, the command."""
    where = f" ({plan.source})" if plan.source else ""
    title = f"{plan.model.name} on {len(plan.nodes):,} {plural(len(plan.nodes), 'node')}{where}"
    blocks: list[Block] = [
        Heading(title, short=True),
        Verdict(plan.verdict, "good" if plan.fits else "bad", short=True),
    ]
    if plan.source.startswith("simulated"):
        text = "simulated: machines of presets or of snapshots, no node was measured"
        blocks.append(Paragraph(text, tone="warn", short=True))
    if plan.fits:
        blocks.append(Items(plan.warnings, tone="warn", **ONLY_SHORT))
        blocks += [Heading("What is promised"), *_promise(plan)]
    else:
        blocks += remedies_table(plan.remedies, "What would fit")
    kinds = _kinds_that_serve(plan)
    if kinds:
        blocks.append(_table(_OF_KINDS, kinds[:_KINDS], **ONLY_SHORT))
        blocks += [Heading("Nodes that serve, by kind"), _table(_OF_KINDS, kinds)]
    blocks += [*listed("Notes", plan.warnings), *listed("Why", plan.reasons)]
    blocks += remedies_table(plan.remedies[:_REMEDIES], "What would fit", **ONLY_SHORT)
    # If the plan fits, the verdict counts the nodes that are left out, and a warning says why.
    blocks += _left_out(plan, short=not plan.fits)
    if plan.serve is not None:
        blocks.append(remark("on a node of the Ray cluster:", short=True))
        blocks.append(Code(shell_words(plan.serve.argv), short=True))
    rest = len(kinds) - _KINDS
    rest_of = f" ({rest} more {plural(rest, 'kind')} of nodes)" if rest > 0 else ""
    more = f"more: --full{rest_of}, --md, or --json with each node's settings"
    return [*blocks, remark(more, **ONLY_SHORT)]


def _promise(plan: ClusterPlan) -> list[Block]:
    """The limits of a request on any node, and the speed of all nodes together."""
    limits, speed = plan.limits, plan.throughput
    assert limits is not None
    facts = {
        "promise": plan.promise,
        "requests": f"{plan.requests_at_once:,} at once over all nodes",
        "forecast": None if speed is None else speed_in_short(speed),
    }
    patches, pixels = limits.max_dynamic_patch, limits.max_pixels_per_image
    engines = f"{plan.engines:,} {plural(plan.engines, 'engine')}"
    more = {
        "answers a request": f"{limits.copies(images=False)} at most (n)",
        "max_dynamic_patch": None if patches is None else str(patches),
        "max_pixels": None if pixels is None else f"{pixels:,} an image",
        "KV caches": f"{plan.total_tokens:,} tokens in {engines}",
    }
    return [known_facts(facts, short=True), known_facts(more)]


_OF_KINDS: Final = ("nodes", "cards", "engine", "tp x n", "KV tokens", "req/s", "at once", "which")


def _kinds_that_serve(plan: ClusterPlan) -> list[tuple[str, ...]]:
    """One row per kind of node (equal cards, groups and settings); the largest kind comes first."""
    kinds: dict[object, list[tuple[NodePlan, Plan]]] = {}
    for node in plan.nodes:
        if node.plan is not None:
            served = node.plan
            group_settings = tuple(group.settings for group in served.by_group)
            layout = (served.engine, served.parallel.groups, served.settings, group_settings)
            kinds.setdefault((node.cards, layout), []).append((node, served))
    rows: list[tuple[str, ...]] = []
    for members in sorted(kinds.values(), key=len, reverse=True):
        node, served = members[0]
        tokens = [plan.kv.total_tokens for _, plan in members]
        spans = dict.fromkeys((f"{min(tokens):,}", f"{max(tokens):,}"))
        speed = served.throughput
        rows.append(
            (
                f"{len(members):,}",
                node.cards,
                served.engine.name,
                f"{served.parallel.tp}x{served.parallel.replicas}",
                " to ".join(spans),
                three_digits(speed.requests_per_second) if speed is not None else "-",
                three_digits(node.at_once),
                _names([node for node, _ in members]),
            )
        )
    return rows


def _left_out(plan: ClusterPlan, *, short: bool) -> list[Block]:
    """The nodes that serve nothing, by cards and reason."""
    groups: dict[tuple[str, str], list[NodePlan]] = {}
    for node in plan.nodes:
        if node.plan is None and node.why_not:
            groups.setdefault((node.cards, node.why_not), []).append(node)
    rows = [
        (f"{len(members):,}", cards or "-", why, _names(members))
        for (cards, why), members in sorted(groups.items(), key=lambda pair: -len(pair[1]))
    ]
    nodes = _table(("nodes", "cards", "why", "which"), rows, short=short)
    return [Heading("Nodes that serve nothing", short=short), nodes] if rows else []


def _names(members: Sequence[NodePlan]) -> str:
    names = ", ".join(node.name for node in members[:_NAMES])
    more = len(members) - _NAMES
    return names if more <= 0 else f"{names} and {more:,} more"


def status_view(status: ClusterStatus) -> list[Block]:
    """The state of a cluster, node by node."""
    up = [node for node in status.nodes if node.up]
    title = f"{status.name}: {len(up)} of {len(status.nodes)} nodes serve, {status.source}"
    blocks: list[Block] = [Heading(title)]
    if status.pretend:
        blocks.append(Paragraph("PRETEND GPUs: what is generated means nothing", tone="warn"))
    facts = {
        "model": status.model,
        "promise": status.promise,
        "address": ", ".join(status.urls) or "none yet",
        "KV cache": f"{sum(node.tokens for node in up):,} tokens that serve",
        "under way": f"{sum(node.outstanding for node in status.nodes):,} requests",
        "as of": status.at,
        "change of plan": status.change,
    }
    rows = [
        (
            f"{node.name} ({node.id[:8]})",
            node.state if node.up or node.state != "serving" else "serving, down",
            f"{node.outstanding:,}",
            three_digits(node.at_once) if node.at_once else "-",
            f"{node.tokens:,}",
            shorten(node.why_not or node.said, 300, placeholder=" …"),
        )
        for node in status.nodes
    ]
    names = ("node", "state", "requests", "at once", "KV tokens", "why, or said last")
    return [
        *blocks, known_facts(facts), _table(names, rows), *listed("What happened", status.events)
    ]  # fmt: skip
