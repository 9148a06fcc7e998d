"""Clients whose requests end engines, and how many answers everybody else gets meanwhile.

    python -m bench.gateway.poison [--engines 3 1] [--seconds 25] [--good 200]

One client sends the same killing request in a tight loop, another one a new variation each time;
neither waits for anything. The good ones behave as the OpenAI SDK does: after a 503 or 429, and
where the connection broke, they send the request again, twice at most, after the seconds that
``Retry-After`` names; half of them stream. Engines are `paced.py`'s, in this process: one that dies
breaks off all its connections, and listens again some seconds later. The gateway is the real one,
with its sockets. Exits with 1 where a bar is missed. While the only engine starts nobody answers.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import aiohttp

from bench.gateway.paced import Paced
from tests.support.gateway import plan_for
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.quarantine.accounts import BUDGET
from turbofit.gateway.server import Ends, make_gateway, serve_gateway

KILLS = "end of the engine"
#: Share of the good requests that must be answered, and deaths of one fingerprint.
LEAST, MOST = 0.99, 2
_ATTEMPTS = 3


class Engine:
    """A stand-in for one engine's process: it dies of some requests, and is started again."""

    def __init__(self, port: int, restart: float, kills_after: float) -> None:
        self.port, self.restart, self.kills_after = port, restart, kills_after
        self.connections: set[asyncio.BaseTransport] = set()
        self.deaths: list[str] = []
        self.server: asyncio.Server | None = None

    async def start(self) -> None:
        engine = self

        class Mortal(Paced):
            tokens, first, each = 20, 0.1, 0.02

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                engine.connections.add(transport)
                if engine.server is None:  # it died between accept() and this call
                    transport.abort()  # type: ignore[attr-defined]

            def connection_lost(self, _exc: Exception | None) -> None:
                engine.connections.discard(self.transport)

            async def answer(self, body: bytes) -> None:
                at = body.find(KILLS.encode())
                if at < 0:
                    await super().answer(body)
                    return
                await asyncio.sleep(engine.kills_after)
                if not self.transport.is_closing():
                    await engine.die(body[at : at + 40].decode())

        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(
            Mortal, "127.0.0.1", self.port, reuse_address=True, backlog=2048
        )
        self.port = self.server.sockets[0].getsockname()[1]

    async def die(self, why: str) -> None:
        if self.server is None:
            return
        self.deaths.append(why)
        self.server.close()
        self.server = None
        for transport in tuple(self.connections):
            transport.abort()  # type: ignore[attr-defined]
        await asyncio.sleep(self.restart)
        await self.start()


class Clients:
    """Everybody who asks, each with a key."""

    def __init__(self, url: str, session: aiohttp.ClientSession, ends: float) -> None:
        self.url, self.session, self.ends = url, session, ends
        self.answers: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.slowest = 0.0

    async def good(self, key: str, rng: random.Random) -> None:
        await asyncio.sleep(rng.random())
        number = 0
        while time.monotonic() < self.ends:
            number += 1
            began = time.monotonic()
            stream = rng.random() < 0.5
            for attempt in range(_ATTEMPTS):
                status, wait = await self.ask(key, f"question {key} {number}", stream)
                self.answers["first 200"] += status == 200 and not attempt
                if status not in (429, 503, 0) or attempt == _ATTEMPTS - 1:
                    break
                await asyncio.sleep(wait or 0.5 * 2**attempt)
            self.answers["sent"] += 1
            self.answers["200"] += status == 200
            self.slowest = max(self.slowest, time.monotonic() - began)
            await asyncio.sleep(0.5 + rng.random())

    async def bad(self, key: str, variations: bool) -> None:
        number = 0
        while time.monotonic() < self.ends:
            number += variations
            status, _ = await self.ask(key, f"{KILLS} {number}", stream=False)
            self.refusals[f"{key}: {status}"] += 1
            await asyncio.sleep(0.005)  # as fast as a client on another machine could

    async def ask(self, key: str, text: str, stream: bool) -> tuple[int, float]:
        """The status (0 where the answer broke off) and the seconds of `Retry-After`."""
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": stream}
        headers = {"authorization": f"Bearer {key}"}
        url = self.url + "/v1/chat/completions"
        try:
            async with self.session.post(url, json=body, headers=headers) as response:
                data = await response.read()
        except (aiohttp.ClientError, OSError):
            return 0, 0.0
        whole = response.status != 200 or not stream or data.endswith(b"data: [DONE]\n\n")
        broken = b'"engine_died"' in data and response.status == 200
        wait = float(response.headers.get("Retry-After", 0))
        return (response.status if whole and not broken else 0), wait


async def run(args: argparse.Namespace, engines: int) -> str:
    """One row."""
    fleet = [Engine(0, args.restart, args.kills_after) for _ in range(engines)]
    for engine in fleet:
        await engine.start()
    keys = [f"good-{number}" for number in range(args.good)]
    config = GatewayConfig(
        port=0,
        api_keys=("same", "new", *keys),
        retry_seconds=0.5,
        quarantine=str(Path(args.folder) / f"{engines}-{time.monotonic_ns()}.json"),
    )
    urls = [f"http://127.0.0.1:{engine.port}" for engine in fleet]
    gateway = make_gateway(plan_for(), urls, config)
    ends, ready = Ends(), asyncio.get_running_loop().create_future()
    serving = asyncio.ensure_future(serve_gateway(gateway, ends=ends, on_ready=ready.set_result))
    for engine in gateway.engines:
        engine.start_seconds = args.restart  # a supervisor knows it of the first start
        engine.succeeded()
    timeout, connector = aiohttp.ClientTimeout(total=120), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        clients = Clients(await ready, session, time.monotonic() + args.seconds)
        good = [clients.good(key, random.Random(args.seed + n)) for n, key in enumerate(keys)]
        await asyncio.gather(*good, clients.bad("same", False), clients.bad("new", True))
    ends.tell(urgent=False)
    await serving
    for engine in fleet:
        if engine.server is not None:
            engine.server.close()
    deaths = Counter(why.partition('"')[0] for engine in fleet for why in engine.deaths)
    return judge(args, engines, clients, deaths)


def judge(args: argparse.Namespace, engines: int, clients: Clients, deaths: Counter[str]) -> str:
    answers = clients.answers
    share, at_once = answers["200"] / answers["sent"], answers["first 200"] / answers["sent"]
    same = deaths.get(f"{KILLS} 0", 0)
    new = sum(deaths.values()) - same
    one = max((count for why, count in deaths.items()), default=0)
    unanswered = engines > 1 and share < LEAST
    args.missed = args.missed or unanswered or one > MOST or new > BUDGET + 1
    refused = ", ".join(f"{who} × {n:,}" for who, n in sorted(clients.refusals.items()))
    return (
        f"| {engines} | {answers['sent']:,} | {share:.2%} | {at_once:.2%} | {clients.slowest:.1f} s"
        f" | {same} | {new} | {one} | {refused} |"
    )


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.poison", description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--good", type=int, default=200)
    parser.add_argument("--restart", type=float, default=2.0)
    parser.add_argument("--kills-after", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.missed = False
    with tempfile.TemporaryDirectory() as args.folder, suppress(KeyboardInterrupt):
        print(
            "| engines | good requests | answered | at the first attempt | slowest | deaths by the "
            "same request | by variations | most of one | answers to the bad ones |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for engines in args.engines:
            print(await run(args, engines), flush=True)
    return int(args.missed)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
