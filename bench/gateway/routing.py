"""What it costs to choose an engine: microseconds a request, by the number of engines.

    python -m bench.gateway.routing

Synthetic engines, of which each tenth has twice the share. Three loads: ``free`` requests hold
nothing; ``images`` hold units of a gate that is half full; ``full`` means that all gates are full,
and each request that ends lets one in that waits. ``tick`` is the monitor's look at all engines, in
milliseconds, with nothing to do. One request is admit, begin, end and release, as `app` does them.
Copied into a checkout of before 2026-11-21 it measures the code of before.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import random
import statistics
import sys
import time
from typing import Any

from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.engines import RoutedEngine, least_busy
from turbofit.gateway.routing.health import Monitor

OLD = "gate" in inspect.signature(Admission).parameters
COUNTS = (1, 16, 256, 1000, 8000)
GATE = 52
ROOM = 1 << 40


def gate_of() -> Any:
    """A gate as the code at hand has it: before 2026-11-22 a number of units."""
    try:
        from turbofit.gateway.limits.gate import Gate
    except ImportError:
        return GATE
    return Gate(GATE)


def made(count: int) -> tuple[list[RoutedEngine], Admission]:
    shares = [2.0 if i % 10 == 0 else 1.0 for i in range(count)]
    if OLD:
        found = [RoutedEngine(i, "http://x", share) for i, share in enumerate(shares)]
        return found, Admission(found, gate=GATE, host_bytes=ROOM, longest=10**9, seconds=1e6)
    found = [
        RoutedEngine(i, "http://x", share, gate=gate_of(), host_limit=ROOM)
        for i, share in enumerate(shares)
    ]
    return found, Admission(found, longest=10**9, seconds=1e6)


async def admit(door: Admission, units: int) -> tuple[RoutedEngine, Cost]:
    cost = Cost(units=units)
    engine = await (door.admit("c", cost, least_busy) if OLD else door.admit("c", cost))
    engine.outstanding += 1
    return engine, cost


def release(door: Admission, held: tuple[RoutedEngine, Cost]) -> None:
    held[0].outstanding -= 1
    door.release(*held)


async def steady(count: int, units: int, held: int, rounds: int) -> float:
    """Seconds a request, while ``held`` requests an engine are there and end in any order."""
    _, door = made(count)
    dice = random.Random(1)
    there = [await admit(door, units) for _ in range(held * count)]
    times = []
    for _ in range(rounds):
        at = dice.randrange(len(there))
        began = time.perf_counter()
        release(door, there[at])
        there[at] = await admit(door, units)
        times.append(time.perf_counter() - began)
    return statistics.fmean(times)


async def full(count: int, rounds: int) -> float:
    """Seconds a request, where one always waits: its task's own wake-up is in it."""
    _, door = made(count)
    there = [await admit(door, 13) for _ in range(GATE // 13 * count)]
    dice = random.Random(1)
    waiting = asyncio.ensure_future(admit(door, 13))
    await asyncio.sleep(0)
    began = time.perf_counter()
    for _ in range(rounds):
        at = dice.randrange(len(there))
        release(door, there[at])
        there[at] = await waiting
        waiting = asyncio.ensure_future(admit(door, 13))
        await asyncio.sleep(0)
    seconds = time.perf_counter() - began
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    return seconds / rounds


def tick(count: int) -> float:
    """Seconds of one look at all engines."""
    found, _ = made(count)
    for engine in found:
        engine.succeeded()
    monitor = Monitor(found, lambda _: asyncio.sleep(0), lambda: None)
    began = time.perf_counter()
    for _ in range(5):
        if OLD:
            [one for one in found if one.index not in monitor._asking and monitor._due(one)]
        else:
            monitor._ask_those_due()
    return (time.perf_counter() - began) / 5


async def main() -> None:
    argparse.ArgumentParser(
        prog="python -m bench.gateway.routing", description=__doc__
    ).parse_args()
    print(f"{'before' if OLD else 'after'}, Python {sys.version.split()[0]}, us a request")
    print("| engines | free | images | full | tick ms |")
    print("|---:|---:|---:|---:|---:|")
    for count in COUNTS:
        rounds = max(200, min(20_000, 400_000 // count if OLD else 20_000))
        free = await steady(count, 0, 4, rounds)
        images = await steady(count, 13, 2, rounds)
        last = await full(count, rounds)
        numbers = " | ".join(f"{seconds * 1e6:.1f}" for seconds in (free, images, last))
        print(f"| {count} | {numbers} | {tick(count) * 1e3:.2f} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
