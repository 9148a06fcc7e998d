"""A server under a steady load with faults, for hours: what grows, and what becomes slower?

    python -m bench.soak --hours 2                              # stand-in engines
    python -m bench.soak --hours 2 --engine pretend --write     # LMDeploy on pretend GPUs
    python -m bench.soak --hours 0.083 --every 20               # five minutes

Exits with 1 where memory, descriptors, threads or disk grow, the gateway adds more at the end than
at the beginning, a request hangs or gets a 5xx other than 503, or something is left at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from bench.page import ran_on, table
from bench.soak.clients import Clients
from bench.soak.faults import Faults
from bench.soak.ground import Ground
from bench.soak.samples import TOLERANCES, Sample, shown, taken, verdict
from bench.soak.served import Soaked

RESULTS = Path(__file__).with_name("RESULTS.md")
#: Samples of a run, and the comparisons of gateway and engine in each.
SAMPLES, COMPARISONS = 120, 5


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between two faults")
    parser.add_argument("--engine", choices=("stand-in", "pretend"), default="stand-in")
    parser.add_argument("--samples", type=Path, help="a file for the samples, a JSON line each")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    args = parser.parse_args()
    with Ground() as ground:
        served = Soaked(args.engine, ground)
        served.wait()
        samples, clients, faults = asyncio.run(_soak(served, args))
        wrong = served.end()
    text, good = _report(args, samples, clients, faults, wrong)
    print(text)
    if args.write:
        RESULTS.write_text(f"# What a soak showed\n\n{text}", encoding="utf-8")
    return int(not good)


async def _soak(served: Soaked, args: argparse.Namespace) -> tuple[list[Sample], Clients, Faults]:
    seconds, faults = args.hours * 3600, Faults(served)
    await faults.warm_up()
    began = time.monotonic()
    ends, samples = began + seconds, []
    async with Clients(served.port, args.rate) as clients:
        load = asyncio.ensure_future(clients.run(ends))
        broken = asyncio.ensure_future(faults.run(args.every, ends))
        for number in range(1, SAMPLES + 1):
            await asyncio.sleep(max(0.0, began + number * seconds / SAMPLES - time.monotonic()))
            for engine in served.engines()[:1] * COMPARISONS:
                if not faults.busy:  # an engine that stands still would be compared with another
                    await clients.compare(engine)
            held = taken(served.pid, served.port, served.folder)
            one = Sample(
                at=time.monotonic() - began, requests=clients.sent + clients.compared,
                faults=len(faults.done), added=tuple(clients.added), **held,
            )  # fmt: skip
            clients.added.clear()
            samples.append(one)
            if args.samples:
                with args.samples.open("a") as file:
                    file.write(json.dumps(one._asdict()) + "\n")
        await asyncio.gather(load, broken)
    return samples, clients, faults


def _report(
    args: argparse.Namespace,
    samples: list[Sample],
    clients: Clients,
    faults: Faults,
    wrong: list[str],
) -> tuple[str, bool]:
    found = verdict(samples)
    bad = sum(
        count for what, count in clients.outcomes.items()
        if what.startswith(("hung", "lost")) or (what.startswith("5") and what != "503")
    )  # fmt: skip
    answered = clients.outcomes["200"] / max(1, clients.sent)
    good = all(one.flat for one in found) and not bad and not wrong
    outcomes = ", ".join(f"{what}: {n:,}" for what, n in sorted(clients.outcomes.items()))
    command = f"--hours {args.hours:g} --rate {args.rate:g} --every {args.every:g}"
    rows = [
        (one.what, shown(one.first), shown(one.last), TOLERANCES[one.what],
         "flat" if one.flat else "**grows**")
        for one in found
    ]  # fmt: skip
    text = (
        f"`python -m bench.soak {command} --engine {args.engine}`, {ran_on()}: "
        f"**{'flat' if good else 'not flat'}**. {clients.sent:,} requests ({outcomes}; "
        f"{answered:.2%} answered), {len(faults.done)} faults. Left at the end: "
        f"{', '.join(wrong) or 'nothing'}.\n\n"
    )
    head = "| second tenth of the time | last tenth | may grow by |"
    return f"{text}{table(head, rows)}\n", good


if __name__ == "__main__":
    sys.exit(main())
