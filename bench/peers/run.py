"""The same card, model and worst images for LMDeploy and turbofit. See RESULTS.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from bench.page import ran_on, table
from bench.peers.engine import PAIRS, PLAN, SETTINGS, Pair, Row, turbomind_row
from bench.peers.workload import sent
from turbofit.model.presets import find_preset, preset_model

HEAD = """# turbofit's plan against its peers

{told}

{bars}

## What was put to everybody

{sent}

## Every start

{table}

## Versions and command

{versions}, {seconds:.0f} s in all.

    python -m bench.peers.run --results FILE
"""


class Verdict(NamedTuple):
    """Whether a pair meets the bar, and against whom; ``met`` None where nobody runs."""

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
        return Verdict(ours, best, None if best is None else False)
    return Verdict(ours, best, best is None or (ours.tokens or 0) >= (best.tokens or 0))


def verdict_table(rows: Sequence[Row]) -> str:
    """One line a pair."""
    lines = []
    for ours, best, met in map(verdict, of_pairs(rows)):
        bar = {True: "met", False: "**missed**", None: "neither runs"}[met]
        peer = ("none", "", "")
        if best is not None:
            held = best.tokens and ours.fate == "survived" and ours.tokens
            more = f"{ours.tokens / best.tokens - 1:+.1%}" if held else ""
            peer = (best.who, _tokens(best), more)
        lines.append((ours.pair, _tokens(ours), *peer, bar))
    head = "pair | our tokens | best peer that survives | its tokens | ours more by | bar"
    return table(head, lines, right="134")


def row_table(rows: Sequence[Row]) -> str:
    """Every start."""
    words = {"refused": "did not start", "hung": "hung at start"}
    lines = []
    for found in of_pairs(rows):
        ours = next(row for row in found if row.who == PLAN)
        lines += [
            (row.pair, row.who, row.settings, _tokens(row), words.get(row.fate, row.fate),
             "; ".join(filter(None, (row.of, row.note))), better(row, ours))
            for row in found
        ]  # fmt: skip
    head = (
        "pair | setting | ratio / batch / prefill | KV tokens | fate | of what; what was refused"
        " | where a peer is better"
    )
    return table(head, lines, right="3")


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
    batches = [int((one.settings.split(" / ") * 2)[1] or 0) for one in (row, ours)]
    if all(batches) and batches[0] > batches[1]:
        told.append(f"batch of {batches[0]}")
    return ", ".join(told)


def _tokens(row: Row) -> str:
    return "" if row.tokens is None else f"{row.tokens:,}"


def summary(rows: Sequence[Row]) -> str:
    """The bar in one line, and where it was missed."""
    judged = [one for one in map(verdict, of_pairs(rows)) if one.met is not None]
    missed = [one.ours.pair for one in judged if not one.met]
    told = f"Bar met on {len(judged) - len(missed)} of {len(judged)} pairs that somebody can run"
    return f"{told}; missed: {', '.join(missed)}." if missed else f"{told}."


def sent_table(pairs: Sequence[Pair]) -> str:
    """What each model's engines were sent."""
    names = dict.fromkeys(pair.model for pair in pairs)
    models = ((name, find_preset(name)) for name in names)
    return table(
        "model | requests", [(name, sent(preset_model(one))) for name, one in models if one]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three pairs")
    parser.add_argument("--only", help="pairs whose name contains this")
    parser.add_argument("--results", type=Path, help="write the tables here too")
    args = parser.parse_args()
    pairs = [p for p in PAIRS if (p.quick or not args.quick) and (args.only or "") in p.name]
    rows = list[Row]()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for number, pair in enumerate(pairs, 1):
            print(f"[{number}/{len(pairs)}] {pair.name}", file=sys.stderr, flush=True)
            for setting in SETTINGS:
                rows.append(turbomind_row(pair, setting, Path(scratch)))
                print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    text = HEAD.format(
        told=summary(rows),
        bars=verdict_table(rows),
        sent=sent_table(pairs),
        table=row_table(rows),
        versions=ran_on("turbofit", "lmdeploy", "torch"),
        seconds=time.monotonic() - begun,
    )
    print(text)
    if args.results:
        args.results.write_text(text, encoding="utf-8")
    return 1 if any(verdict(found).met is False for found in of_pairs(rows)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
