"""The results as Markdown: one function a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from bench.peers.grid import PLAN
from bench.peers.row import Row


class Verdict(NamedTuple):
    """Whether a pair meets the bar, and against whom; ``met`` None where it does not apply."""

    pair: str
    ours: Row
    best: Row | None
    met: bool | None


def of_pairs(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each pair, as they came."""
    return [list(found) for _, found in groupby(rows, key=lambda row: row.pair)]


def verdict(rows: Sequence[Row]) -> Verdict:
    """The plan against the surviving peer that holds most."""
    ours = next(row for row in rows if row.who == PLAN)
    peers = [row for row in rows if row.who != PLAN and row.fate == "survived"]
    best = max(peers, key=lambda row: row.tokens or 0, default=None)
    if ours.fate != "survived":
        return Verdict(ours.pair, ours, best, None if best is None else False)
    met = best is None or (ours.tokens or 0) >= (best.tokens or 0)
    return Verdict(ours.pair, ours, best, met)


def verdict_table(rows: Sequence[Row]) -> str:
    """One line a pair."""
    lines = [
        "| pair | our tokens | best peer that survives | its tokens | ours more by | bar |",
        "|---|--:|---|--:|--:|---|",
    ]
    for found in of_pairs(rows):
        seen = verdict(found)
        best, ours = seen.best, seen.ours
        bar = {True: "met", False: "**missed**", None: "neither runs"}[seen.met]
        if best is None:
            lines.append(f"| {seen.pair} | {_tokens(ours)} | none | | | {bar} |")
            continue
        lines.append(
            f"| {seen.pair} | {_tokens(ours)} | {best.who} | {_tokens(best)}"
            f" | {_more(ours, best)} | {bar} |"
        )
    return "\n".join(lines)


def _more(ours: Row, best: Row) -> str:
    if ours.fate != "survived" or ours.tokens is None or not best.tokens:
        return ""
    return f"{ours.tokens / best.tokens - 1:+.1%}"


def row_table(rows: Sequence[Row]) -> str:
    """Every start."""
    lines = [
        "| pair | setting | ratio / batch / prefill | KV tokens | fate | of what; what was refused"
        " | where a peer is better |",
        "|---|---|---|--:|---|---|---|",
    ]
    for found in of_pairs(rows):
        ours = next(row for row in found if row.who == PLAN)
        for row in found:
            told = "; ".join(text for text in (row.of, row.note) if text)
            lines.append(
                f"| {row.pair} | {row.who} | {row.settings} | {_tokens(row)}"
                f" | {_fate(row)} | {told} | {better(row, ours)} |"
            )
    return "\n".join(lines)


def better(row: Row, ours: Row) -> str:
    """In what a peer that lived beats the plan's row; empty for the plan."""
    if row.who == PLAN or row.fate != "survived":
        return ""
    told = []
    if ours.fate != "survived":
        told.append("runs, the plan does not")
    elif (row.tokens or 0) >= (ours.tokens or 0):
        told.append("**more tokens**")
    if ours.note and not row.note:
        told.append("admits all that was asked")
    batch, our_batch = _batch(row), _batch(ours)
    if batch is not None and our_batch is not None and batch > our_batch:
        told.append(f"batch of {batch}")
    return ", ".join(told)


def _batch(row: Row) -> int | None:
    """The batch, from the settings that the row shows."""
    parts = row.settings.split(" / ")
    return int(parts[1]) if len(parts) == 3 else None


def _fate(row: Row) -> str:
    told = {"refused": "did not start", "hung": "hung at start"}
    return told.get(row.fate, row.fate)


def _tokens(row: Row) -> str:
    return "" if row.tokens is None else f"{row.tokens:,}"


def summary(rows: Sequence[Row]) -> str:
    """The bar in one line, and where it was missed."""
    seen = [verdict(found) for found in of_pairs(rows)]
    judged = [v for v in seen if v.met is not None]
    missed = [v.pair for v in judged if not v.met]
    told = f"Bar met on {len(judged) - len(missed)} of {len(judged)} pairs that somebody can run"
    return f"{told}; missed: {', '.join(missed)}." if missed else f"{told}."
