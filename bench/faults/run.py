"""Faults, and how `turbofit serve` comes out of each.

    python -m bench.faults.run [--only WORDS] [--write]

Each fault ends in recovery or in the right typed exit, none in a hang past its deadline: that is
the bar. ``--write`` puts the table into RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.faults.cases import CASES
from bench.faults.ground import Ground, Outcome
from bench.page import ran_on, table

DEADLINE = 300.0
PAGE = """# Faults and how turbofit ended

{good} of {all} faults end in recovery or in the right typed exit; none hangs. Written by `python -m
bench.faults.run --write`, {ran_on}.

`pretend`: LMDeploy 0.18's real server and TurboMind on pretend GPUs. `stand-in`: a server that
prints and dies like one, for what is about processes and files.

{table}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults.run", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    args = parser.parse_args()
    rows, good = [], 0
    for name, (kind, bar, function) in CASES.items():
        if args.only not in name:
            continue
        began = time.monotonic()
        with Ground() as ground:
            try:
                ok, said = function(ground)
            except Exception as exc:  # noqa: BLE001 - a fault that broke the bench is a failure
                ok, said = Outcome(ok=False, said=f"{type(exc).__name__}: {exc}"[-600:])
        took = time.monotonic() - began
        ok = ok and took < DEADLINE
        good += ok
        rows.append((name, kind, bar, said, f"{took:.0f}", "ok" if ok else "**failed**"))
        print(f"{'ok  ' if ok else 'FAIL'} {took:6.1f} s  {name}: {said}", flush=True)
    print(f"{good} of {len(rows)}")
    if args.write:
        shown = table("fault | engine | bar | seen | s |", rows)
        page = PAGE.format(good=good, all=len(rows), ran_on=ran_on("lmdeploy"), table=shown)
        Path(__file__).with_name("RESULTS.md").write_text(page, encoding="utf-8")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
