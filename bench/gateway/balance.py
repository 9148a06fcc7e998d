"""The same requests through our gateway and through LMDeploy's proxy, to the same stand-in engines.

    python -m bench.gateway.balance [--engines 1 4 16] [--seconds 10]

Engines are `slotted.py`'s, a quarter of them of half the speed. The closed load has six clients for
each four slots, each of which asks again at once; the open one is a Poisson process at 70 % of what
all slots together could do. Requests and arrivals are seeded, the same for every router. ``told``:
the router knows the speeds (shares here, ``speed`` of a node there). ``x4``: four gateways that
know nothing of each other, behind a client that asks them in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

from bench.gateway.run import ROOT, Way, cpu_seconds, machine, median, p99
from bench.gateway.slotted import EVENTS, SLOTS

MEAN = 0.5
#: Seconds to the first byte and to the end, and when that was; -1 where it failed.
Times = tuple[float, float, float]
STRATEGIES = ("random", "min_expected_latency", "min_observed_latency")
HEAD = (
    "| engines | load | router | requests a second | first byte p50 / p99, ms | "
    "end p50 / p99, ms | busiest engine | idlest engine | failed |"
)
GATEWAY = """
import json, sys
from bench.common.gateway import plan_for
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.routing.routing_table import Member, RoutingTable
from turbofit.gateway.server import make_routing_table_gateway, run_gateway
port, urls, shares, gateways = json.loads(sys.argv[1])
members = tuple(
    Member(name=url, url=url, share=share, host_bytes=1 << 40)
    for url, share in zip(urls, shares, strict=True)
)
table = RoutingTable(number=1, bounds=bounds_of(plan_for()), members=members, gateways=gateways)
run_gateway(make_routing_table_gateway(table, GatewayConfig(port=port)))
"""
PROXY = """
import json, sys
from bench.common.standin.standin_engine import shim_torchvision
shim_torchvision()
from lmdeploy.serve.proxy import proxy
port, strategy = json.loads(sys.argv[1])
proxy.proxy(server_name="127.0.0.1", server_port=port, routing_strategy=strategy,
            log_level="ERROR", disable_cache_status=True)
"""


def body_of(number: int) -> bytes:
    messages = [{"role": "user", "content": "What is this? " * 8}]
    body = {"model": "m", "messages": messages, "stream": True, "user": str(number)}
    return json.dumps(body).encode()


def fetched(port: int, path: str, document: object = None) -> bytes:
    data = None if document is None else json.dumps(document).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


class Router:
    """A router in a process of its own, before engines in another."""

    def __init__(self, name: str, port: int, speeds: list[float], mean: float, told: bool) -> None:
        self.port, self.engines, self.gateways = port, port + 10, 1
        urls = [f"http://127.0.0.1:{self.engines + i}" for i in range(len(speeds))]
        words = ["-m", "bench.gateway.slotted", "--port", str(self.engines), "--mean", str(mean)]
        self.children = [self.begin([*words, "--speeds", *map(str, speeds)], subprocess.PIPE)]
        assert self.children[0].stdout is not None
        assert self.children[0].stdout.readline() == b"ready\n"
        known = [speed * 2 for speed in speeds] if told else [1.0] * len(speeds)
        if name == "direct":
            self.port = self.engines
        elif name.startswith("turbofit"):
            self.gateways = int(name.partition(" x")[2] or 1)
            for number in range(self.gateways):
                words = [port + number, urls, known, self.gateways]
                self.children.append(self.begin(["-c", GATEWAY, json.dumps(words)]))
        else:
            self.children.append(self.begin(["-c", PROXY, json.dumps([port, name])]))
            self.answers("/v1/models")
            for url, speed in zip(urls, known, strict=True):
                status = {"models": ["m"], "speed": int(speed)}
                fetched(port, "/nodes/add", {"url": url, "status": status})
        if name.startswith("turbofit"):
            for way in self.ways():
                self.answers("/health", way.port)
        self.pid = self.children[-1].pid

    @staticmethod
    def begin(words: list[str], told: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        # Neither writes a log of requests.
        quiet = {**os.environ, "UVICORN_LOG_LEVEL": "warning"}
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=told, stderr=subprocess.DEVNULL, env=quiet
        )

    def ways(self) -> list[Way]:
        return [Way(self.port + number) for number in range(self.gateways)]

    def answers(self, path: str, port: int | None = None) -> None:
        for _ in range(300):
            with suppress(OSError):
                fetched(port or self.port, path)
                return
            time.sleep(0.1)
        raise RuntimeError("the router does not answer")

    def stats(self) -> list[list[float]]:
        return json.loads(fetched(self.engines, "/stats"))

    def end(self) -> None:
        for child in reversed(self.children):
            child.terminate()
            child.wait()


async def one(ways: list[Way], number: int, found: list[Times]) -> None:
    try:
        first, end, events = await asyncio.wait_for(
            ways[number % len(ways)].ask(body_of(number)), 60
        )
    except Exception:  # noqa: BLE001 - whatever it was, the client has no answer
        found.append((-1.0, -1.0, 0.0))
        return
    fine = events == EVENTS + 1
    found.append((first, end, time.perf_counter()) if fine else (-1.0, -1.0, 0.0))


async def closed(ways: list[Way], clients: int, count: int) -> tuple[list[Times], float, float]:
    found: list[Times] = []
    numbers, last = iter(range(count)), [0.0]

    async def client() -> None:
        for number in numbers:
            last[0] = time.perf_counter()
            await one(ways, number, found)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return found, began, last[0]


async def opened(ways: list[Way], rate: float, count: int) -> tuple[list[Times], float, float]:
    found: list[Times] = []
    dice, tasks = random.Random(7), []
    began = at = time.perf_counter()
    for number in range(count):
        at += dice.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(ways, number, found)))
    last = time.perf_counter()
    await asyncio.gather(*tasks)
    return found, began, last


async def run_one(name: str, count: int, load: str, told: bool, args: argparse.Namespace) -> str:
    speeds = [0.5 if number % 4 == 3 else 1.0 for number in range(count)]
    capacity = sum(speeds) * SLOTS / MEAN
    router = Router(name, args.port, speeds, MEAN, told)
    try:
        ways, requests = router.ways(), max(80, int(args.seconds * capacity * 0.9))
        if load == "closed":
            found, began, last = await closed(ways, 6 * count, requests)
        else:
            found, began, last = await opened(ways, 0.7 * capacity, int(requests * 0.75))
        took = time.perf_counter() - began
        stats = router.stats()
    finally:
        router.end()
    good = [times for times in found if times[1] >= 0]
    # What ended before the last was asked: at the end some engines have nothing left to do.
    steady = sum(times[2] <= last for times in good) / (last - began)
    firsts, ends = ([t[i] * 1e3 for t in good] or [-1.0] for i in (0, 1))
    busy = [row[1] / took / SLOTS for row in stats]
    return (
        f"| {count} | {load} | {name}{', told' if told else ''} | {steady:.1f} | "
        f"{median(firsts):.0f} / {p99(firsts):.0f} | {median(ends):.0f} / {p99(ends):.0f} | "
        f"{max(busy):.0%} | {min(busy):.0%} | {len(found) - len(good)} |"
    )


async def overhead(name: str, args: argparse.Namespace) -> str:
    """One request after the other to an engine that takes no time."""
    router = Router(name, args.port, [1.0], 0.0, False)
    try:
        ways = router.ways()
        await closed(ways, 1, 50)
        before = cpu_seconds(router.pid)
        found, _, _ = await closed(ways, 1, 500)
        used = cpu_seconds(router.pid) - before
    finally:
        router.end()
    ends = [times[1] * 1e3 for times in found]
    cpu = "" if name == "direct" else f"{used / 500 * 1e3:.2f}"
    return f"| {name} | {median(ends):.2f} / {p99(ends):.2f} | {cpu} |"


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.balance", description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=19500)
    args = parser.parse_args()
    print(machine())
    print("\n| router | end p50 / p99, ms | CPU a request, ms |\n|---|---|---|")
    for name in ("direct", "turbofit", *STRATEGIES):
        print(await overhead(name, args), flush=True)
    print(f"\n{HEAD}\n|" + "---|" * 9)
    for count in args.engines:
        for load in ("closed", "open"):
            for told in (False, True)[: 1 if count == 1 else 2]:
                for name in ("turbofit", "turbofit x4", *STRATEGIES):
                    if name == "turbofit x4" and count < 16:
                        continue
                    if told and name == "min_observed_latency":
                        continue  # it does not look at speeds
                    print(await run_one(name, count, load, told, args), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
