"""``python -m bench.plans CHECK [--count N] [--seed 1] [--write]``: what must hold of plans.

properties  of any plan: no engine without code for the card, no refusal without a thing to change,
            no number without a unit
promises    of a second plan with more memory or cards, or with less asked for: it fits where the
            first does, and image limit, context and the goal's value are no smaller
least       of a plan with ``--least``: it fits where the plan without it does, serves images as
            large, holds what was asked for, and takes no more
registry    of architectures: turbofit's answer to each that LMDeploy lists (needs LMDeploy)

Prints how requests ended, and each that breaks something; of the registry a page, which ``--write``
renews.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from statistics import median

from bench.page import table
from bench.plans.promises import least_breaks, shrinks, taken
from bench.plans.properties import of_plan, of_refusal
from bench.plans.requests import Request, pairs, planned, requests
from turbofit.api import plan
from turbofit.core.errors import TurbofitError

#: How a request ended, and the property that it broke, if any.
Ends = Iterator[tuple[str, str]]


def properties(count: int, seed: int) -> Ends:
    for request in requests(count, seed):
        end, broken = judged(request)
        yield end, "; ".join(broken) and f"{request}: {'; '.join(broken)}"


def judged(request: Request) -> tuple[str, list[str]]:
    """Plan a request; returns how it ends, and which properties it breaks."""
    try:
        found = plan(request.model, on=request.on, **request.options)
    except TurbofitError as exc:
        return f"refused ({exc.kind})", list(of_refusal(exc))
    return f"{'fits' if found.fits else 'does not fit'}, {found.backend.name}", list(of_plan(found))


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
    """Run the program; returns 1 if something does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plans", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("check", choices=(*CHECKS, "registry"))
    parser.add_argument("--count", type=int, help="of plans or pairs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="renew the page of the registry")
    args = parser.parse_args(argv)
    if args.check == "registry":
        return written(write=args.write)
    check, usual = CHECKS[args.check]
    ends = Counter[str]()
    broken = 0
    for end, why in check(args.count or usual, args.seed):
        ends[end] += 1
        broken += bool(why)
        if why:
            print(f"- {why}", flush=True)
    print(table("end | requests", ((end, f"{n:,}") for end, n in sorted(ends.items())), right="1"))
    print(f"\n{broken} do not hold.")
    return int(broken > 0)


def written(*, write: bool) -> int:
    """Print the page of LMDeploy's registries, and write it if asked."""
    from bench.plans import registry
    from tests.support.standin.standin_engine import mend_torchvision

    mend_torchvision()
    page = registry.table()
    print(page, end="")
    if write:
        registry.OUT.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
