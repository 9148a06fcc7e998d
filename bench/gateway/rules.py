"""Rules of choosing an engine, by simulation: no sockets, no noise, `balance.py`'s engines.

    python -m bench.gateway.rules

The next request goes to the engine with the lowest (n + c) / share: c is 1 where ours began, 0 is
LMDeploy's, which looks at its engines in a random order.
"""

from __future__ import annotations

import argparse
import random
from heapq import heappop, heappush
from itertools import count

from bench.gateway.slotted import SLOTS, service

MEAN = 0.5


def simulate(speeds: list[float], c: float, load: float, closed: bool, requests: int = 20_000):
    """Requests a second, and seconds until the first event: mean and 99th percentile."""
    dice, serial = random.Random(3), count()
    capacity = sum(speeds) * SLOTS / MEAN
    outstanding, free = [0] * len(speeds), [SLOTS] * len(speeds)
    lines: list[list[tuple[float, int]]] = [[] for _ in speeds]
    events: list[tuple[float, int, int, int]] = []  # moment, order, engine or -1, request
    firsts: list[float] = []
    sent, now = 0, 0.0
    if closed:
        for _ in range(round(load * SLOTS * len(speeds))):
            heappush(events, (0.0, next(serial), -1, sent))
            sent += 1
    else:
        heappush(events, (0.0, next(serial), -1, 0))
        sent = 1

    def begin(engine: int, came: float, request: int) -> None:
        first, each = (seconds / speeds[engine] for seconds in service(request, MEAN))
        firsts.append(now + first - came)
        heappush(events, (now + first + 8 * each, next(serial), engine, request))

    while events and sent < requests:
        now, _, engine, request = heappop(events)
        if engine < 0:
            if not closed:
                heappush(events, (now + dice.expovariate(load * capacity), next(serial), -1, sent))
                sent += 1
            order = dice.sample(range(len(speeds)), len(speeds)) if not c else range(len(speeds))
            engine = min(order, key=lambda one: (outstanding[one] + c) / speeds[one])
            outstanding[engine] += 1
            if free[engine]:
                free[engine] -= 1
                begin(engine, now, request)
            else:
                lines[engine].append((now, request))
            continue
        outstanding[engine] -= 1
        if lines[engine]:
            begin(engine, *lines[engine].pop(0))
        else:
            free[engine] += 1
        if closed:
            heappush(events, (now, next(serial), -1, sent))
            sent += 1
    firsts.sort()
    return len(firsts) / now, sum(firsts) / len(firsts), firsts[int(len(firsts) * 0.99)]


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.gateway.rules", description=__doc__).parse_args()
    print("| engines | load | c = 1 | c = 1/2 | c = 0 |\n|---|---|---|---|---|")
    for number in (4, 16):
        speeds = [0.5 if one % 4 == 3 else 1.0 for one in range(number)]
        loads = ((True, 0.5), (True, 1.0), (True, 1.5), (False, 0.3), (False, 0.7), (False, 0.9))
        for closed, load in loads:
            cells = []
            for c in (1.0, 0.5, 0.0):
                rate, mean, last = simulate(speeds, c, load, closed)
                cells.append(f"{rate:.1f}/s, {mean * 1e3:.0f}, {last * 1e3:.0f} ms")
            word = f"closed, {load:g} a slot" if closed else f"open, {load:.0%}"
            print(f"| {number} | {word} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
