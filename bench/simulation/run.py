"""``python -m bench.simulation.run``: simulates days by their seeds, in several processes."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import count, islice
from typing import Any

from bench.simulation.scenario import KINDS, of_kind, simulate
from bench.simulation.world import Result
from turbofit.gateway.http.uvicorn_server import keep_large_blocks

#: Days of a task; of one whose first violation ends the run, since what has begun runs on.
_BATCH, _SMALL_BATCH = 50, 5
_SHOWN = 20


def main() -> int:
    """Run the days; returns 1 if something that must hold did not."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulation.run", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--days", type=int, default=100, help="how many")
    parser.add_argument("--kind", choices=sorted(KINDS), help="only days of this kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="one day, with its history")
    parser.add_argument("--counts", action="store_true", help="how often what happened, as a table")
    parser.add_argument("--first-violation", action="store_true", help="end at the first")
    given = parser.parse_args()
    if given.seed is not None:
        result = simulate(given.seed)
        print("\n".join(result.log))
        print(f"seed {given.seed}: {len(result.violations)} violations, history {result.digest}")
        return 1 if result.violations else 0
    began = time.monotonic()
    results = _run(given)
    print(_summary(results, time.monotonic() - began))
    if given.counts:
        counts = sum((Counter(one.counts) for one in results), Counter[str]())
        print("\n| what | times |\n|---|---|")
        print("\n".join(f"| {name} | {many:,} |" for name, many in sorted(counts.items())))
    return 1 if any(one.violations for one in results) else 0


def _run(given: Any) -> list[Result]:
    seeds: Sequence[int] = range(given.first, given.first + given.days)
    if given.kind is not None:
        found = (seed for seed in count(given.first) if of_kind(given.kind, seed) is not None)
        seeds = list(islice(found, given.days))
    size = _SMALL_BATCH if given.first_violation else _BATCH
    results: list[Result] = []
    with ProcessPoolExecutor(given.workers, initializer=_begin) as pool:
        batches = [seeds[at : at + size] for at in range(0, len(seeds), size)]
        waiting = [pool.submit(_days, batch, given.first_violation) for batch in batches]
        for done in as_completed(waiting):
            results += done.result()
            broken = [one for one in done.result() if one.violations]
            for one in broken:  # now, since a long run may be cut off
                print(f"seed {one.seed}: {one.violations[0]}", file=sys.stderr)
            if broken and given.first_violation:
                pool.shutdown(cancel_futures=True)
                break
    return results


def _begin() -> None:
    """Prepare a worker: without garbage collection, which took 7 % of a day's time."""
    keep_large_blocks()
    gc.disable()


def _days(seeds: Sequence[int], first: bool) -> list[Result]:
    results = []
    for seed in seeds:
        began = time.process_time()
        result = simulate(seed)
        result.processor = time.process_time() - began
        result.log.clear()
        results.append(result)
        if first and result.violations:
            break
    return results


def _summary(results: list[Result], seconds: float) -> str:
    """Return a paragraph on all days, and the first violation of each seed."""
    broken = sorted((one.seed, one.violations) for one in results if one.violations)
    faults = sum(
        many for one in results for name, many in one.counts.items() if name.startswith("fault ")
    )
    requests = sum(one.counts.get("requests", 0) for one in results)
    processor = sum(one.processor for one in results) / max(len(results), 1)
    lines = [
        f"{len(results)} simulated days with {faults} faults and {requests} requests: "
        f"{sum(len(found) for _, found in broken)} violations in {len(broken)} of them; "
        f"{seconds:.0f} s, {processor:.2f} s of processor time each"
    ]
    return "\n".join(
        [*lines, *(f"seed {seed}: {found[0][:300]}" for seed, found in broken[:_SHOWN])]
    )


if __name__ == "__main__":
    sys.exit(main())
