"""Hostile clients against a server: any URL, with the gateway or without.

    # twenty minutes of everything, and at least 1,000 requests that reach the engine:
    python -m bench.gateway.hostile URL --minutes 20 --reach 1000 --seed 1

Exits with 1 when the server is gone, when its health is lost, or on a 5xx other than 503.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import aiohttp

from bench.page import table
from tests.support.gateway import CHAT, chat, data_url, picture
from tests.support.mutations import Mutator

_PATHS = (
    "/update_weights", "//update_weights", "/v1/%2e%2e/get_ppl", "/GET_PPL", "/sleep?level=2",
    "/distserve/free_cache", "/terminate", "/v1/embeddings", "/openapi.json", "/../../etc/passwd",
)  # fmt: skip
_SIZES = (
    (448, 448), (448, 5376), (5376, 448), (1792, 1344), (3584, 3584), (4096, 4096), (1000, 5),
    (8000, 8000), (2688, 2016),
)  # fmt: skip


class Hostile:
    """Clients that send requests which the plan forbids, and some which it allows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.url = args, args.url.rstrip("/")
        self.counts: Counter[str] = Counter()
        self.reached = 0
        self.slowest = 0.0
        self.offences: list[str] = []
        self.ends = time.monotonic() + args.minutes * 60
        self.images = {size: data_url(picture(*size)) for size in _SIZES}
        self.headers = {"anthropic-version": "2023-06-01"}
        if args.api_key:
            self.headers["authorization"] = f"Bearer {args.api_key}"

    @property
    def done(self) -> bool:
        enough = self.args.requests and sum(self.counts.values()) >= self.args.requests
        late = time.monotonic() > self.ends and self.reached >= self.args.reach
        return bool(self.offences or late or (enough and self.reached >= self.args.reach))

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=600)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            headers=self.headers, timeout=timeout, connector=connector
        ) as session:
            self.session = session
            await self.find_model()
            clients = [self.client(number) for number in range(self.args.clients)]
            await asyncio.gather(self.watch(), *clients)

    async def find_model(self) -> None:
        async with self.session.get(self.url + "/v1/models") as response:
            self.model = (await response.json())["data"][0]["id"]

    async def watch(self) -> None:
        """Note an offence if the server's health page fails."""
        while not self.done:
            await asyncio.sleep(2)
            try:
                async with self.session.get(self.url + "/health") as response:
                    if response.status != 200:
                        self.offences.append(f"health {response.status}")
            except aiohttp.ClientError as exc:
                self.offences.append(f"gone: {exc}")

    async def client(self, number: int) -> None:
        rng = random.Random(self.args.seed * 100_003 + number)
        mutator = Mutator(rng.randrange(1 << 30))
        ways = (self.knobs, self.knobs, self.bent, self.bent, self.leaves, self.strays, self.honest)
        while not self.done:
            began = time.monotonic()
            try:
                await rng.choice(ways)(rng, mutator)
            except aiohttp.ServerDisconnectedError:
                self.counts["disconnected"] += 1
            except aiohttp.ClientConnectorError as exc:
                self.offences.append(f"gone: {exc}")
            except (aiohttp.ClientError, ConnectionError):
                self.counts["client error"] += 1
            self.slowest = max(self.slowest, time.monotonic() - began)

    def image(self, rng: random.Random, **knobs: Any) -> dict[str, Any]:
        url = self.images[rng.choice(_SIZES)]
        return {"type": "image_url", "image_url": {"url": url, **knobs}}

    async def knobs(self, rng: random.Random, _: Mutator) -> None:
        """Send the largest images with extreme parameters."""
        knobs = rng.choice(
            (
                {"max_dynamic_patch": rng.choice((13, 24, 120, 5000))}, {"detail": "high"},
                {"max_pixels": 10**9}, {"min_pixels": 10**8, "max_pixels": 10**9},
            )
        )  # fmt: skip
        parts = [self.image(rng, **knobs) for _ in range(rng.choice((1, 1, 1, 2, 6)))]
        body = self.body(*parts, n=rng.choice((1, 1, 1, 2, 64)), stream=rng.random() < 0.5)
        await self.post(CHAT, json.dumps(body).encode())

    async def bent(self, _: random.Random, mutator: Mutator) -> None:
        path, raw = mutator.request()
        await self.post(path, raw.replace(b'"model": "m"', f'"model": "{self.model}"'.encode()))

    async def leaves(self, rng: random.Random, _: Mutator) -> None:
        """Close the connection in the middle of a stream."""
        body = self.body(self.image(rng), stream=True, max_tokens=200)
        async with self.session.post(self.url + CHAT, json=body) as response:
            self.note(response.status)
            await response.content.readany()

    async def strays(self, rng: random.Random, _: Mutator) -> None:
        """Ask other routes, none of which the gateway may let through."""
        url = self.url + rng.choice(_PATHS)
        async with self.session.post(url, json={}) as response:
            self.counts[f"stray {response.status}"] += 1
            if response.status == 200:
                self.offences.append(f"{url} answered 200")

    async def honest(self, rng: random.Random, _: Mutator) -> None:
        body = self.body(*([] if rng.random() < 0.5 else [self.image(rng)]), max_tokens=16)
        await self.post(CHAT, json.dumps(body).encode())

    def body(self, *parts: Any, **fields: Any) -> dict[str, Any]:
        return {**chat(*parts), "model": self.model, "max_tokens": 8, **fields}

    async def post(self, path: str, raw: bytes) -> None:
        headers = {"content-type": "application/json"}
        async with self.session.post(self.url + path, data=raw, headers=headers) as response:
            await response.read()
            self.note(response.status)

    def note(self, status: int) -> None:
        self.counts[str(status)] += 1
        self.reached += status == 200
        if status >= 500 and status != 503:
            self.offences.append(f"status {status}")

    def report(self, seconds: float) -> str:
        cells = (
            self.args.seed, f"{seconds / 60:.1f} min", f"{sum(self.counts.values()):,}",
            f"{self.reached:,}",
            ", ".join(f"{name}: {count:,}" for name, count in sorted(self.counts.items())),
            f"{self.slowest:.1f} s",
            "; ".join(self.offences[:3]) or "none",
        )  # fmt: skip
        head = "seed | time | requests | reached the engine | answers | slowest | offences"
        return table(head, [cells])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.hostile", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=0, help="end after so many")
    parser.add_argument("--reach", type=int, default=0, help="… and so many answered with 200")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--api-key")
    args = parser.parse_args()
    hostile, began = Hostile(args), time.monotonic()
    asyncio.run(hostile.run())
    print(hostile.report(time.monotonic() - began))
    return int(bool(hostile.offences))


if __name__ == "__main__":
    sys.exit(main())
