"""The same card, model and worst images for LMDeploy and turbofit. See RESULTS.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import turbofit
from bench.peers.grid import PAIRS, SETTINGS, Pair
from bench.peers.row import Row
from bench.peers.tables import of_pairs, row_table, summary, verdict, verdict_table
from bench.peers.turbomind import turbomind_row
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

{versions}
"""


def sent_table(pairs: Sequence[Pair]) -> str:
    """What each model's engines were sent."""
    lines = ["| model | requests |", "|---|---|"]
    for name in dict.fromkeys(pair.model for pair in pairs):
        preset = find_preset(name)
        assert preset is not None
        lines.append(f"| {name} | {sent(preset_model(preset))} |")
    return "\n".join(lines)


def versions_text(seconds: float) -> str:
    """What ran, and how to run it again."""
    return (
        f"turbofit {turbofit.__version__}, LMDeploy {version('lmdeploy')},"
        f" torch {version('torch')}, Python {sys.version.split()[0]}, {os.cpu_count()} cores,"
        f" {time.strftime('%Y-%m-%d')}, {seconds:.0f} s in all.\n\n"
        "    python -m bench.peers.run --results FILE"
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
        versions=versions_text(time.monotonic() - begun),
    )
    print(text)
    if args.results:
        args.results.write_text(text, encoding="utf-8")
    return 1 if any(verdict(found).met is False for found in of_pairs(rows)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
