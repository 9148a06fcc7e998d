"""``python -m bench.sweep [--count 2000] [--seed 1] [--write]``: properties of many plans.

Random presets, cards and options; no plan for an engine without code for the card, no refusal
without a thing to change, no number without a unit. Prints what breaks one; ``--write`` renews
`RESULTS.md`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import turbofit
from bench.sweep.cases import Case, cases
from bench.sweep.properties import of_plan, of_refusal
from turbofit.core.errors import TurbofitError

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where a property does not hold."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="renew RESULTS.md")
    args = parser.parse_args(argv)
    began = time.process_time()
    ends: Counter[str] = Counter()
    broken: list[str] = []
    for case in cases(args.count, args.seed):
        end, found = judged(case)
        ends[end] += 1
        broken += [f"{case}: {text}" for text in found]
    page = _page(args, ends, broken, time.process_time() - began)
    print(page)
    if args.write:
        (HERE / "RESULTS.md").write_text(page + "\n")
    return bool(broken)


def judged(case: Case) -> tuple[str, list[str]]:
    """How a request ends, and what it breaks."""
    try:
        plan = turbofit.plan(case.model, on=case.on, **case.options)
    except TurbofitError as exc:
        return f"refused ({exc.kind})", list(of_refusal(exc))
    return f"{'fits' if plan.fits else 'does not fit'}, {plan.engine.name}", list(of_plan(plan))


def _page(args: argparse.Namespace, ends: Counter[str], broken: list[str], seconds: float) -> str:
    today = datetime.now(timezone.utc).date()
    rows = [f"| {end} | {count:,} |" for end, count in sorted(ends.items())]
    return "\n".join(
        (
            "# Properties of many plans",
            "",
            f"`python -m bench.sweep --count {args.count} --seed {args.seed} --write`, {today}:"
            f" {platform.machine()}, Python {platform.python_version()}, {seconds:.0f} s of"
            " processor time.",
            "",
            "| end | plans |",
            "|---|---|",
            *rows,
            "",
            f"Broken properties: {len(broken)}.",
            *(f"- {text}" for text in broken),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
