"""A cluster as a document; nodes with equal cards and settings share a row."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import counted
from turbofit.core.units import grouped, three_digits
from turbofit.report.painters.document import (
    Code,
    Heading,
    Verdict,
    first_warnings,
    known_facts,
    listed,
    remark,
    remedies_table,
    table,
)
from turbofit.report.views.figures import shell_words
from turbofit.report.views.plan_view import promise_facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from turbofit.core.cluster import ClusterPlan, NodePlan, NodeStatus
    from turbofit.core.plan import Plan
    from turbofit.report.painters.document import Block

#: The number of node names that a row lists.
_NAMES: Final = 3
#: Columns of numbers.
_RIGHT: Final = ("nodes", "tp x n", "KV tokens", "req/s", "at once")
#: Columns whose text may be broken over lines.
_WRAPPED: Final = ("cards", "which", "serve nothing, since", "node", "why not, or last line")


def cluster_view(plan: ClusterPlan) -> list[Block]:
    """Return blocks on a cluster's plan: verdict, limits of a request, kinds of nodes, and command.

    Kinds of nodes that serve come before kinds of nodes that serve nothing.
    """
    title = f"{plan.model.name} on {counted(len(plan.nodes), 'node')}"
    blocks: list[Block] = [
        Heading(f"{title} ({plan.source})" if plan.source else title, short=True),
        Verdict(plan.verdict, "good" if plan.fits else "bad", short=True),
    ]
    if plan.fits:
        context = f"{plan.plans[0].promise.context:,} tokens with the answer"
        facts = {**promise_facts(plan.plans[0]), "context": context}
        blocks += [
            *first_warnings(plan.warnings),
            Heading("What is promised"),
            known_facts(facts, short=True),
            Heading("Nodes that serve, by kind"),
        ]
    # A key is a row of the table below, without the number and the names of its nodes.
    serving = grouped((_kind(node.cards, node.plan), node) for node in plan.nodes if node.plan)
    left_out = grouped(
        ((node.cards, node.why_not), node) for node in plan.nodes if node.plan is None
    )
    names = ("nodes", "cards", "engine", "tp x n", "KV tokens", "req/s", "at once", "which")
    blocks += _kinds(names, serving.items())
    blocks += [*listed("Notes", plan.warnings), *remedies_table(plan.remedies, "What would fit")]
    blocks += _kinds(("nodes", "cards", "serve nothing, since", "which"), left_out.items())
    if plan.serve is not None:
        blocks.append(remark("on a node of the Ray cluster:", short=True))
        blocks.append(Code(shell_words(plan.serve.argv), short=True))
    return blocks


def _kind(cards: str, plan: Plan) -> tuple[str, ...]:
    """Return the middle cells of the row of all nodes with these cards and an equal plan."""
    rate = plan.throughput.requests_per_second if plan.throughput else None
    return (
        cards, plan.backend.name, f"{plan.tp}x{plan.replicas}", f"{plan.kv_tokens:,}",
        "-" if rate is None else three_digits(rate), f"{plan.requests_at_once:,}",
    )  # fmt: skip


def _kinds(
    names: Sequence[str], kinds: Iterable[tuple[tuple[str, ...], list[NodePlan]]]
) -> Iterator[Block]:
    """Yield a table with a row for each kind of node, the most frequent kind first.

    Yields nothing if ``kinds`` is empty.
    """
    rows = []
    for row, members in sorted(kinds, key=lambda kind: -len(kind[1])):
        which, more = ", ".join(node.name for node in members[:_NAMES]), len(members) - _NAMES
        which += f" and {more:,} more" if more > 0 else ""
        rows.append((f"{len(members):,}", *row, which))
    if rows:
        yield table(names, rows, right=_RIGHT, wrap=_WRAPPED, short=True)


def status_view(nodes: Sequence[NodeStatus]) -> Iterator[Block]:
    """Yield a table for each served model, with its nodes and their states."""
    names = ("node", "cards", "state", "at once", "KV tokens", "why not, or last line")
    for serves in dict.fromkeys(node.serves for node in nodes):
        members = [node for node in nodes if node.serves == serves]
        up = sum(node.state == "serving" for node in members)
        rows = (
            (
                node.name, node.cards, node.state, f"{node.at_once:,}", f"{node.tokens:,}",
                shorten(node.why_not or node.said, 300, placeholder=" …"),
            )
            for node in members
        )  # fmt: skip
        yield Heading(f"{up} of {counted(len(members), 'node')} serve {serves}")
        yield table(names, rows, right=_RIGHT, wrap=_WRAPPED)
