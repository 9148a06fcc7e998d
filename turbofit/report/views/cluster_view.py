"""A cluster as a document; nodes with equal cards and settings share a row."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.messages import plural
from turbofit.core.units import three_digits
from turbofit.report.painters.document import (
    Code,
    Heading,
    Paragraph,
    Table,
    Verdict,
    first_warnings,
    known_facts,
    listed,
    remark,
    remedies_table,
    table,
)
from turbofit.report.views.figures import shell_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.cluster import ClusterPlan, ClusterStatus, NodePlan
    from turbofit.report.painters.document import Block

#: The number of node names that a row lists.
_NAMES: Final = 3
_SERVING: Final = ("nodes", "cards", "engine", "tp x n", "KV tokens", "req/s", "at once", "which")
_LEFT_OUT: Final = ("nodes", "cards", "why", "which")
_STATES: Final = ("node", "cards", "state", "at once", "KV tokens", "why, or said last")
#: Columns of numbers, and columns whose text may be broken over lines.
_RIGHT: Final = ("nodes", "tp x n", "KV tokens", "req/s", "at once")
_WRAPPED: Final = ("cards", "which", "why", "node", "why, or said last")


def _table(names: Sequence[str], rows: Iterable[tuple[str, ...]], **places: Any) -> Table:
    return table(names, rows, right=_RIGHT, wrap=_WRAPPED, **places)


def cluster_view(plan: ClusterPlan) -> list[Block]:
    """The verdict, the promise, the kinds of nodes, the nodes that are left out, the command."""
    title = f"{plan.model.name} on {len(plan.nodes):,} {plural(len(plan.nodes), 'node')}"
    blocks: list[Block] = [
        Heading(f"{title} ({plan.source})" if plan.source else title, short=True),
        Verdict(plan.verdict, "good" if plan.fits else "bad", short=True),
    ]
    if plan.source.startswith("simulated"):
        text = "simulated: machines of presets or of snapshots, no node was measured"
        blocks.append(Paragraph(text, tone="warn", short=True))
    serving: dict[tuple[str, ...], list[NodePlan]] = {}
    left_out: dict[tuple[str, ...], list[NodePlan]] = {}
    for node in plan.nodes:
        if (served := node.plan) is None:
            left_out.setdefault((node.cards, node.why_not), []).append(node)
            continue
        speed = served.throughput
        row = (
            node.cards,
            served.engine.name,
            f"{served.parallel.tp}x{served.parallel.replicas}",
            f"{served.kv.total_tokens:,}",
            three_digits(speed.requests_per_second) if speed is not None else "-",
            f"{served.requests_at_once:,}",
        )
        serving.setdefault(row, []).append(node)
    if (limits := plan.limits) is not None:
        images = None
        if limits.vision_unit is not None:
            unit = plural(limits.units_per_image, limits.vision_unit)
            images = f"{limits.images_per_request} of up to {limits.units_per_image:,} {unit}"
        facts = {
            "a request": f"{plan.longest_request_tokens:,} tokens",
            "images": images,
            "answers a request": f"{limits.copies(images=False)} at most (n)",
        }
        blocks += [
            *first_warnings(plan.warnings),
            Heading("What is promised"),
            known_facts(facts, short=True),
            Heading("Nodes that serve, by kind"),
            _table(_SERVING, _rows(serving), short=True),
        ]
    blocks += [*listed("Notes", plan.warnings), *remedies_table(plan.remedies, "What would fit")]
    if left_out:
        blocks.append(Heading("Nodes that serve nothing", short=True))
        blocks.append(_table(_LEFT_OUT, _rows(left_out), short=True))
    if plan.serve is not None:
        blocks.append(remark("on a node of the Ray cluster:", short=True))
        blocks.append(Code(shell_words(plan.serve.argv), short=True))
    return blocks


def _rows(kinds: dict[tuple[str, ...], list[NodePlan]]) -> Iterable[tuple[str, ...]]:
    """The rows of equal nodes with their number and names; the most nodes come first."""
    for row, members in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        names = ", ".join(node.name for node in members[:_NAMES])
        more = len(members) - _NAMES
        yield f"{len(members):,}", *row, names if more <= 0 else f"{names} and {more:,} more"


def status_view(status: ClusterStatus) -> list[Block]:
    """The state of a cluster, node by node."""
    up = [node for node in status.nodes if node.state == "serving"]
    title = f"{status.name}: {len(up)} of {len(status.nodes)} nodes serve, {status.source}"
    rows = (
        (
            node.name, node.cards, node.state, f"{node.at_once:,}", f"{node.tokens:,}",
            shorten(node.why_not or node.said, 300, placeholder=" …"),
        )
        for node in status.nodes
    )  # fmt: skip
    return [Heading(title), _table(_STATES, rows)]
