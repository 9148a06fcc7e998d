"""``python -m bench.promises [--count 5000] [--seed 1] [--write]``: no promise shrinks.

Plans random pairs of requests of which the second has more memory or cards, or asks for less. Its
plan must fit where the first's does, and its image limit, then its context, then the goal's value
must not be smaller. Prints each pair that breaks this; ``--write`` renews `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import turbofit
from bench.promises.pairs import KINDS, Pair, Request, pairs
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan

HERE: Final = Path(__file__).parent
#: Tokens by which rounding to blocks may shorten a context, and the share of a value that they are.
_ROUNDING: Final = 64
_SHARE: Final = 0.001
#: Tokens that the batch may cost where they are the goal.
_BATCH_SHARE: Final = 0.01
#: The context that is promised where nobody asks for another.
_ENOUGH: Final = 32_768
#: Kinds of pairs whose rates are of different loads.
_OTHER_LOAD: Final = ("concurrency",)


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where a promise shrinks."""
    parser = argparse.ArgumentParser(prog="python -m bench.promises", description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="renew RESULTS.md")
    args = parser.parse_args(argv)
    began = time.process_time()
    compared: Counter[str] = Counter()
    broken = []
    for pair in pairs(args.count, args.seed):
        less, more = planned(pair.less), planned(pair.more)
        if less is None or more is None:
            compared["refused"] += 1
            continue
        compared[pair.kind if less.fits else "neither fits" if not more.fits else "fits now"] += 1
        why = shrinks(pair, less, more)
        if why:
            broken.append(f"{pair.kind}: {pair.less} -> {pair.more}: {why}")
            print(broken[-1], flush=True)
    page = _page(args, compared, broken, time.process_time() - began)
    print(page)
    if args.write:
        (HERE / "RESULTS.md").write_text(page + "\n")
    return bool(broken)


def planned(request: Request) -> Plan | None:
    """The plan; None where something asked for cannot be used there at all."""
    try:
        return turbofit.plan(request.model, on=request.on, **request.options)
    except TurbofitError:
        return None


def shrinks(pair: Pair, less: Plan, more: Plan) -> str:
    """Which promise is smaller in the second plan; empty where none is."""
    if not less.fits:
        return ""
    if not more.fits:
        return f"does not fit any more: {more.verdict}"
    limits = [plan.limits.units_per_image for plan in (less, more)]
    if limits[0] != limits[1]:
        return f"images of {limits[0]} units, then {limits[1]}" if limits[1] < limits[0] else ""
    # Images that need a longer context get it, which is no promise to fewer of them.
    contexts = [plan.settings.session_len for plan in (less, more)]
    if pair.kind == "images":
        contexts = [min(context, _ENOUGH) for context in contexts]
    if pair.kind != "context" and abs(contexts[0] - contexts[1]) > _ROUNDING:
        shorter = contexts[1] < contexts[0]
        return f"a context of {contexts[0]}, then {contexts[1]}" if shorter else ""
    values = [plan.considered[0].score if plan.considered else 0.0 for plan in (less, more)]
    if pair.kind in _OTHER_LOAD or less.engine != more.engine:
        return ""
    share = _BATCH_SHARE if less.workload.goal == "context" else _SHARE
    if values[1] < values[0] * (1 - share):
        return f"a value of {values[0]:.4g}, then {values[1]:.4g}"
    return ""


def _page(
    args: argparse.Namespace, compared: Counter[str], broken: list[str], seconds: float
) -> str:
    today = datetime.now(timezone.utc).date()
    rows = [f"| {kind} | {compared[kind]:,} |" for kind in (*KINDS, "fits now", "neither fits")]
    return "\n".join(
        (
            "# Does a promise shrink because there is more?",
            "",
            f"`python -m bench.promises --count {args.count} --seed {args.seed} --write`, {today},"
            f" Python {platform.python_version()}, {seconds:,.0f} s of processor time.",
            "",
            "Pairs of plans of which the second has more of the first column, or asks for less of"
            " it (requests at once, context, images, margin). Both are compared by: fits, image"
            " limit, context (64 tokens of rounding apart), the goal's value (0.1 % apart, and"
            " 1 % of the tokens where they are the goal, which a batch may cost; not"
            " where the loads or the engines differ: TurboMind is preferred to the PyTorch engine"
            " where both keep the promises, and the forecast does not tell their speeds apart).",
            "",
            "| more of it, or less of it asked for | pairs |",
            "|---|--:|",
            *rows,
            f"| refused, by one of both | {compared['refused']:,} |",
            "",
            f"**{len(broken)} shrink.**",
            "",
            *(f"- {text}" for text in broken),
        )
    ).rstrip()


if __name__ == "__main__":
    sys.exit(main())
