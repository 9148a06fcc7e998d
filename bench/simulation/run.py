"""``python -m bench.simulation.run``: simulated days by their seeds, over several processes."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.simulation.history import Result
from bench.simulation.plans import make_store, share
from bench.simulation.report import Totals, write_results
from bench.simulation.scenario import KINDS, of_kind, simulate
from turbofit.gateway.allocator import keep_large_blocks

_BATCH = 50
#: The same where the first violation ends the run: what is in the workers' queue runs on.
_SMALL_BATCH = 5
#: Days of a worker, which ends with what they leave, 1 MB a day: to look for cycles of objects
#: took 7 % of a day.
_LIFE = 2_000
#: End a run, which says then what it showed so far.
_STOPS = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Run the days; 1 where something that must hold did not."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulation.run", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--days", type=int, default=100, help="how many")
    parser.add_argument("--kind", choices=sorted(KINDS), help="only days of this kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, help="end after so many, whatever is left")
    parser.add_argument("--seed", type=int, help="one day, with its history")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    parser.add_argument("--first-violation", action="store_true", help="end at the first")
    given = parser.parse_args()
    if given.seed is not None:
        return _replay(given.seed)
    totals = _run(given)
    print(totals.summary())
    if given.write:
        write_results(Path(__file__).with_name("RESULTS.md"), totals, "--write")
    return 1 if totals.violations else 0


def _replay(seed: int) -> int:
    result = simulate(seed)
    print("\n".join(result.log))
    print(f"seed {seed}: {len(result.violations)} violations, history {result.digest}")
    return 1 if result.violations else 0


def _run(given: Any) -> Totals:
    unit = f"simulated days with {given.kind}" if given.kind else "simulated days"
    totals, began = Totals(given.workers, unit), time.monotonic()
    seeds: Sequence[int] = range(given.first, given.first + given.days)
    if given.kind is not None:
        found = (seed for seed in count(given.first) if of_kind(given.kind, seed) is not None)
        seeds = list(islice(found, given.days))
    size = _SMALL_BATCH if given.first_violation else _BATCH
    batches = [seeds[at : at + size] for at in range(0, len(seeds), size)]
    life = given.workers * _LIFE // size

    stops: list[int] = []
    for stop in _STOPS:
        signal.signal(stop, lambda number, _: stops.append(number))

    def over() -> bool:
        totals.seconds = time.monotonic() - began
        late = given.minutes is not None and totals.seconds > 60 * given.minutes
        return late or bool(stops) or (given.first_violation and bool(totals.violations))

    with TemporaryDirectory(prefix="turbofit-plans-") as folder:
        plans = Path(folder) / "plans.sqlite"
        make_store(plans)
        for at in range(0, len(batches), life):
            if not over():
                _add(totals, batches[at : at + life], given, over, plans)
                # A run of hours may be killed before its summary.
                print(f"\r{totals.days} days, {len(totals.violations)} violations, "
                      f"{totals.seconds:.0f} s", file=sys.stderr)  # fmt: skip
    return totals


def _begin(plans: Path) -> None:
    """In a worker; a signal that ends a run is handled by the process that began it."""
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    keep_large_blocks()
    gc.disable()
    share(plans)


def _add(
    totals: Totals, batches: list[Sequence[int]], given: Any, over: Callable[[], bool], plans: Path
) -> None:
    """Days of so many batches, in workers of their own, which share the plans that they find."""
    with ProcessPoolExecutor(given.workers, initializer=_begin, initargs=(plans,)) as pool:
        waiting = [pool.submit(_days, batch, given.first_violation) for batch in batches]
        for done in as_completed(waiting):
            for result in done.result():
                totals.add(result)
                if result.violations:  # now, since a long run may be cut off
                    print(f"\rseed {result.seed}: {result.violations[0]}", file=sys.stderr)
            if over():
                for one in waiting:
                    one.cancel()
                break
            if sys.stderr.isatty():
                print(f"\r{totals.days} days, {len(totals.violations)} violations",
                      end="", file=sys.stderr)  # fmt: skip


def _days(seeds: Sequence[int], first: bool) -> list[Result]:
    results = []
    for seed in seeds:
        began = time.process_time()
        result = simulate(seed)
        result.processor = time.process_time() - began
        if not result.violations:
            result.log.clear()
        results.append(result)
        if first and result.violations:
            break
    return results


if __name__ == "__main__":
    sys.exit(main())
