"""Faults, and how `turbofit serve` comes out of each.

    python -m bench.faults.run [--only WORDS] [--write]

Each fault ends in recovery or in the right typed exit, none in a hang past its deadline: that is
the bar. ``--write`` puts the table into RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from bench.faults import failing  # noqa: F401 - it registers more
from bench.faults.cases import CASES
from bench.faults.ground import Ground, Outcome

RESULTS = Path(__file__).with_name("RESULTS.md")
DEADLINE = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults.run", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    args = parser.parse_args()
    rows: list[tuple[str, str, str, Outcome, float]] = []
    for name, (kind, bar, function) in CASES.items():
        if args.only not in name:
            continue
        began = time.monotonic()
        with Ground() as ground:
            try:
                outcome = function(ground)
            except Exception as exc:  # noqa: BLE001 - a fault that broke the bench is a failure
                outcome = Outcome(ok=False, said=f"{type(exc).__name__}: {exc}"[-600:])
        took = time.monotonic() - began
        outcome.ok = outcome.ok and took < DEADLINE
        rows.append((name, kind, bar, outcome, took))
        mark = "ok  " if outcome.ok else "FAIL"
        print(f"{mark} {took:6.1f} s  {name}: {outcome.said}", flush=True)
    good = sum(row[3].ok for row in rows)
    print(f"{good} of {len(rows)}")
    if args.write:
        RESULTS.write_text(_table(rows), encoding="utf-8")
    return 0 if good == len(rows) else 1


def _table(rows: list[tuple[str, str, str, Outcome, float]]) -> str:
    good = sum(row[3].ok for row in rows)
    lines = [
        "# Faults and how turbofit ended",
        "",
        f"{good} of {len(rows)} faults end in recovery or in the right typed exit; none hangs. "
        f"Written by `python -m bench.faults.run --write` on {platform.system()}, "
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}.",
        "",
        "`pretend`: LMDeploy 0.18's real server and TurboMind on pretend GPUs. `stand-in`: a "
        "server that prints and dies like one, for what is about processes and files.",
        "",
        "| fault | engine | bar | seen | s | |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind, bar, outcome, took in rows:
        mark = "ok" if outcome.ok else "**failed**"
        said = " ".join(outcome.said.split()).replace("|", "/")
        lines.append(f"| {name} | {kind} | {bar} | {said} | {took:.0f} | {mark} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
