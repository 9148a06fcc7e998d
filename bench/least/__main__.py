"""``python -m bench.least [--count 2000] [--seed 1] [--write]``: `--least` keeps promises.

Plans random requests with and without it. The least plan must fit where the other does, take no
more, serve images as large, and hold the context and the requests that were asked for. Prints each
that breaks this; ``--write`` renews `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Final

from bench.promises.__main__ import planned
from bench.promises.pairs import Request, pairs
from turbofit.core.plan import Plan
from turbofit.memory.account import RATIO_STEPS

HERE: Final = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="python -m bench.least", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="renew RESULTS.md")
    args = parser.parse_args(argv)
    began = time.process_time()
    compared: Counter[str] = Counter()
    shares, broken = [], []
    for pair in pairs(args.count, args.seed):
        options = {key: held for key, held in pair.less.options.items() if key != "goal"}
        request = pair.less._replace(options=options)
        whole = planned(request)
        least = planned(request._replace(options={**options, "least": True}))
        if whole is None or least is None:
            compared["refused"] += 1
            continue
        compared["both fit" if whole.fits else "fits now" if least.fits else "neither fits"] += 1
        why = breaks(request, whole, least) if whole.fits else ""
        if why:
            broken.append(f"{request}: {why}")
            print(broken[-1], flush=True)
        if whole.fits and least.fits:
            shares.append(taken(least) / taken(whole))
    page = _page(args, compared, shares, broken, time.process_time() - began)
    print(page)
    if args.write:
        (HERE / "RESULTS.md").write_text(page + "\n")
    return bool(broken)


def taken(plan: Plan) -> int:
    """Bytes that the engines of a plan hold at the most, on all GPUs."""
    return sum(max(gpu.peak, gpu.load_peak) - gpu.used for gpu in plan.gpus)


def breaks(request: Request, whole: Plan, least: Plan) -> str:
    """What the least plan does not keep; empty where it keeps all."""
    options = request.options
    if not least.fits:
        return f"does not fit: {least.verdict}"
    if least.limits.units_per_image < whole.limits.units_per_image:
        return f"images of {least.limits.units_per_image} units"
    if least.kv.longest_request_tokens < options.get("context", 0):
        return f"a context of {least.kv.longest_request_tokens}"
    if least.requests_at_once < options.get("concurrency", 1):
        return f"{least.requests_at_once} requests at once"
    # Where not all of them are held at once, a step of the ratio may fill a little more.
    step = sum(gpu.total for gpu in least.gpus) // RATIO_STEPS if least.may_evict() else 0
    if taken(least) > taken(whole) + step:
        return f"takes {taken(least):,} bytes, without --least {taken(whole):,}"
    return ""


def _page(
    args: argparse.Namespace,
    compared: Counter[str],
    shares: list[float],
    broken: list[str],
    seconds: float,
) -> str:
    today = datetime.now(timezone.utc).date()
    shares.sort()
    tenth = shares[len(shares) // 10]
    kinds = ("both fit", "fits now", "neither fits", "refused")
    return "\n".join(
        (
            "# Does the least plan keep what was promised?",
            "",
            f"`python -m bench.least --count {args.count} --seed {args.seed} --write`,"
            f" {today}, {seconds:,.0f} s of processor time.",
            "",
            "Requests of `bench.promises`, planned with and without `--least`. The least plan must"
            " fit where the other does, serve images as large, hold the context and the requests"
            " that were asked for, and take no more of the GPUs (but for a step of the ratio, one"
            " thousandth, where not all requests are held at once).",
            "",
            "| with `--least`, without | requests |",
            "|---|--:|",
            *(f"| {kind} | {compared[kind]:,} |" for kind in kinds),
            "",
            f"**{len(broken)} are broken.** The least plan takes {median(shares):.0%} of what the"
            f" other takes (median; a tenth of them {tenth:.0%} or less).",
            "",
            *(f"- {one}" for one in broken),
        )
    ).rstrip()


if __name__ == "__main__":
    sys.exit(main())
