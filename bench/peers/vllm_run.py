"""vLLM beside the plan.

    python -m bench.peers.vllm_run --python PYTHON [--only PART] [--log F] [--results F]

Two to five minutes a pair, most of it vLLM's compiling (``--skip defaults``). Rows that the log has
are not run again, so that a run that was broken off goes on. Exit 1: a surviving vLLM of the bar
holds more tokens than the plan on some pair.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import turbofit
from bench.peers.grid import PLAN, VLLM_PAIRS, Pair
from bench.peers.ours import plan_row
from bench.peers.row import Row, RowLog
from bench.peers.tables import of_pairs, row_table, summary, verdict, verdict_table
from bench.peers.vllm_peer import FLAVOURS, vllm_row, vllm_version

#: A peer's tokens that are so nearly reached count as reached.
_EQUAL = 0.99

HEAD = """# turbofit's plan against vLLM

Made by `python -m bench.peers.vllm_run --python PYTHON --log FILE --results FILE`; simulated cards,
the engines' own code. README.md tells what the columns mean, RESULTS.md what the losses are of.

## The bar: vLLM's defaults, and eager

{told}

{bars}

## vLLM set by hand

`--enforce-eager --max-model-len auto --limit-mm-per-prompt '{{"image":1,"video":0}}'`: what a plan
promises too; and that with `--gpu-memory-utilization 0.97`, where it was run. No peer of the bar.
{hand_told}
With its default `--gpu-memory-utilization` instead: {usual_told}

{hand}

## Every start

{table}

## Versions

{versions}
"""


def rows_of(
    pair: Pair, folder: Path, python: str, log: Path, left: Callable[[str], bool]
) -> list[Row]:
    """All rows of a pair: those of the log, and what was still to be run, told as they come.

    ``left`` says of a setting whether it is left out where the log has it not.
    """
    done = RowLog(log)

    def row(who: str, run: Callable[[], Row]) -> Row | None:
        if (pair.name, who) not in done.rows and left(who):
            return None
        return done.row(pair.name, who, run)

    found = [
        row(PLAN, lambda: plan_row(pair, folder)),
        *(row(one.name, lambda one=one: vllm_row(pair, one, folder, python)) for one in FLAVOURS),
    ]
    return [] if found[0] is None else [one for one in found if one is not None]


def versions_text(python: str) -> str:
    """What ran."""
    return (
        f"turbofit {turbofit.__version__}, LMDeploy {version('lmdeploy')}; vLLM"
        f" {vllm_version(python)}; Python {sys.version.split()[0]}; {time.strftime('%Y-%m-%d')}."
    )


def against(rows: Sequence[Row]) -> list[Row]:
    """The rows of pairs on which something is known of both, the plan and vLLM."""
    known = [row for row in rows if row.fate != "stalled"]
    both = [one for one in of_pairs(known) if one[0].who == PLAN and len(one) > 1]
    return [row for found in both for row in found]


def report(rows: Sequence[Row], versions: str) -> str:
    """The page of results."""
    hand = {flavour.name for flavour in FLAVOURS if flavour.by_hand}
    of_bar = against([row for row in rows if row.who not in hand])
    by_hand = against([row for row in rows if row.who == PLAN or row.who in hand])
    usual = against([row for row in by_hand if "0.97" not in row.who])
    started = {row.pair for row in rows if row.who != PLAN}
    return HEAD.format(
        told=summary(of_bar),
        bars=verdict_table(of_bar),
        usual_told=summary(usual, "as many (-1 %) or more", least=_EQUAL),
        hand_told=summary(by_hand, "The plan holds as many (-1 %) or more", least=_EQUAL),
        hand=verdict_table(by_hand, "as many or more", ("yes", "**no**"), least=_EQUAL),
        table=row_table([row for row in rows if row.pair in started]),
        versions=versions,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.vllm_run", description=__doc__)
    parser.add_argument("--python", required=True, help="a Python that has vLLM")
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("--log", type=Path, default=Path("vllm.jsonl"), help="rows, kept")
    parser.add_argument("--skip", nargs="*", default=[], help="settings with these in their names")
    parser.add_argument("--kept", action="store_true", help="run nothing: tables of the log")
    parser.add_argument("--results", type=Path, help="write the tables here too")
    args = parser.parse_args()
    pairs = [pair for pair in VLLM_PAIRS if args.only in pair.name]
    rows: list[Row] = []

    def left(who: str) -> bool:
        return args.kept or any(part in who for part in args.skip)

    for number, pair in enumerate(pairs, 1):
        print(f"[{number}/{len(pairs)}] {pair.name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            rows += rows_of(pair, Path(scratch), args.python, args.log, left)
    text = report(rows, versions_text(args.python))
    print(text)
    if args.results:
        args.results.write_text(text, encoding="utf-8")
    hand = {flavour.name for flavour in FLAVOURS if flavour.by_hand}
    judged = of_pairs(against([row for row in rows if row.who not in hand]))
    return 1 if any(verdict(found).met is False for found in judged) else 0


if __name__ == "__main__":
    raise SystemExit(main())
