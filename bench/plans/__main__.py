"""``python -m bench.plans CHECK [--count N] [--seed 1] [--write]``: what must hold of plans.

properties  of any plan: no engine without code for the card, no refusal without a thing to change,
            no number without a unit
promises    of a second plan with more memory or cards, or with less asked for: it fits where the
            first does, and image limit, context and the goal's value are no smaller
least       of a plan with ``--least``: it fits where the plan without it does, serves images as
            large, holds what was asked for, and takes no more
registry    of architectures: turbofit's answer to each that LMDeploy lists (needs LMDeploy)

Prints a page, with each request that breaks something; ``--write`` renews the page of the check.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench.page import ran_on, table
from bench.plans.promises import least_breaks, shrinks, taken
from bench.plans.properties import of_plan, of_refusal
from bench.plans.requests import Request, pairs, planned, requests
from turbofit.api import plan
from turbofit.core.errors import TurbofitError

#: How a request ended, and what it broke, if anything.
Ends = Iterator[tuple[str, str]]


def properties(count: int, seed: int) -> Ends:
    for request in requests(count, seed):
        end, broken = judged(request)
        yield end, "; ".join(broken) and f"{request}: {'; '.join(broken)}"


def judged(request: Request) -> tuple[str, list[str]]:
    """How a request ends, and what it breaks."""
    try:
        found = plan(request.model, on=request.on, **request.options)
    except TurbofitError as exc:
        return f"refused ({exc.kind})", list(of_refusal(exc))
    return f"{'fits' if found.fits else 'does not fit'}, {found.engine.name}", list(of_plan(found))


def promises(count: int, seed: int) -> Ends:
    for pair in pairs(count, seed):
        less, more = planned(pair.less), planned(pair.more)
        if less is None or more is None:
            yield "refused, by one of both", ""
            continue
        why = shrinks(pair, less, more)
        end = pair.kind if less.fits else "fits now" if more.fits else "neither fits"
        yield end, why and f"{pair.kind}: {pair.less} -> {pair.more}: {why}"


def least(count: int, seed: int) -> Ends:
    shares = []
    for pair in pairs(count, seed):
        options = {key: held for key, held in pair.less.options.items() if key != "goal"}
        request = pair.less._replace(options=options)
        whole = planned(request)
        small = planned(request._replace(options={**options, "least": True}))
        if whole is None or small is None:
            yield "refused", ""
            continue
        why = least_breaks(request, whole, small) if whole.fits else ""
        end = "both fit" if whole.fits else "fits now" if small.fits else "neither fits"
        yield end, why and f"{request}: {why}"
        if whole.fits and small.fits:
            shares.append(taken(small) / taken(whole))
    if shares:
        yield f"(share that the least plan takes, median: {median(shares):.0%})", ""


CHECKS = {"properties": (properties, 2000), "promises": (promises, 5000), "least": (least, 2000)}


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where something does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plans", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("check", choices=(*CHECKS, "registry"))
    parser.add_argument("--count", type=int, help="of plans or pairs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="renew the page")
    args = parser.parse_args(argv)
    if args.check == "registry":
        from bench.plans import registry
        from tests.support.standin.standin_engine import mend_torchvision

        mend_torchvision()

        page, broken = registry.table(), False
    else:
        page, broken = checked(args)
    print(page, end="")
    if args.write:
        Path(__file__).with_name(f"{args.check.upper()}.md").write_text(page)
    return int(broken)


def checked(args: argparse.Namespace) -> tuple[str, bool]:
    """The page of a check, and whether something does not hold."""
    check, usual = CHECKS[args.check]
    count, began = args.count or usual, time.process_time()
    ends: Counter[str] = Counter()
    broken = []
    for end, why in check(count, args.seed):
        ends[end] += 1
        if why:
            broken.append(f"- {why}")
            print(broken[-1], file=sys.stderr, flush=True)
    seconds = time.process_time() - began
    command = f"python -m bench.plans {args.check} --count {count} --seed {args.seed} --write"
    page = f"""# Plans: {args.check}

`{command}`, {ran_on()}, {seconds:,.0f} s of
processor time. What must hold: `python -m bench.plans --help`.

{table("end | requests", ((end, f"{n:,}") for end, n in sorted(ends.items())), right="1")}

**{len(broken)} do not hold.**
"""
    return page + "".join(f"\n{line}" for line in broken) + "\n" * bool(broken), bool(broken)


if __name__ == "__main__":
    sys.exit(main())
