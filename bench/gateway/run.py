"""Compares direct requests with requests through the gateway, to an upstream paced like a GPU.

    python -m bench.gateway.run [--requests 200] [--memory 100000]

Requests alternate between the two ways, so that both see the same noise. The client is raw asyncio:
a library would cost more than the gateway does. CPU time is the gateway process's own, from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import NamedTuple

from PIL import Image

from bench.page import ran_on, table
from bench.proc import cpu_seconds, resident_mib
from tests.support.gateway import CHAT, TILES, chat, data_url, plan_for

ROOT = Path(__file__).resolve().parents[2]


class Way:
    """A way to the upstream, direct or through the gateway: a port with idle connections to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, body: bytes, path: str = CHAT) -> tuple[float, float, int]:
        """Send a request; returns seconds to the first event and to the end, and the events."""
        reader, writer = await self._connection()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        began = time.perf_counter()
        writer.write(head.encode())
        writer.write(body)
        await writer.drain()
        first, data, events = 0.0, b"", 0
        streamed = False
        while True:
            part = await reader.read(1 << 16)
            if not part:
                raise ConnectionError(data[-200:])
            now = time.perf_counter()
            events += part.count(b"data: ")
            data = (data + part)[-4096:]
            if not first and b"data: " in data:
                first, streamed = now, True
            if streamed and data.endswith(b"0\r\n\r\n"):
                break
            if not streamed and b"\r\n\r\n" in data:
                found = re.search(rb"content-length: (\d+)", data, re.IGNORECASE)
                if found and len(data.partition(b"\r\n\r\n")[2]) >= int(found[1]):
                    first = now
                    if b" 200 " not in data[:20]:
                        raise RuntimeError(data[:400])
                    break
        self.idle.append((reader, writer))
        return first - began, now - began, events

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.idle:
            return self.idle.pop()
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)


@lru_cache(maxsize=16)
def noise_jpeg(size: int, seed: int) -> bytes:
    """Return a JPEG of about ``size`` bytes with ordinary sides, since noise does not compress."""
    side = max(16, int((size * 0.95) ** 0.5))
    image = Image.frombytes("L", (side, side), random.Random(seed).randbytes(side * side))
    file = BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def body_of(images: int, size: int, *, stream: bool = True) -> bytes:
    """Return a chat request with ``images`` images of ``size`` bytes each."""
    urls = [data_url(noise_jpeg(size, number), "image/jpeg") for number in range(images)]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return json.dumps(chat(*parts, stream=stream, max_tokens=64)).encode()


async def pairs(direct: Way, through: Way, body: bytes, count: int) -> dict[str, list[float]]:
    """Send requests both ways by turns, one at a time; returns their milliseconds."""
    found: dict[str, list[float]] = {"d_first": [], "d_end": [], "g_first": [], "g_end": []}
    for number in range(count + 4):
        order = (("d", direct), ("g", through)) if number % 2 else (("g", through), ("d", direct))
        for name, way in order:
            first, end, _ = await way.ask(body)
            if number >= 4:
                found[f"{name}_first"].append(first * 1e3)
                found[f"{name}_end"].append(end * 1e3)
    return found


async def many(way: Way, body: bytes, count: int, at_once: int, pid: int) -> list[float]:
    """Send requests by ``at_once`` clients; returns the memory of ``pid`` in MiB, 11 times."""
    memory, left = [resident_mib(pid)], [count]
    step = max(1, count // 10)

    async def client() -> None:
        while left[0] > 0:
            left[0] -= 1
            if left[0] % step == 0:
                memory.append(resident_mib(pid))
            await way.ask(body)

    await asyncio.gather(*(client() for _ in range(at_once)))
    return memory


def start(*words: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


class Pair(NamedTuple):
    """A paced upstream, a gateway before it, and the gateway's process."""

    direct: Way
    through: Way
    pid: int


@contextmanager
def pair(plan: Path, port: int, *pace: str) -> Iterator[Pair]:
    """Start the upstream at ``port`` and the gateway at the next port, each in its own process."""
    upstream, url = start("-m", "bench.gateway.paced", "--port", str(port), *pace)
    gateway, gateway_url = start(
        "-m", "turbofit", "gateway", "--plan", str(plan), "--upstream", url,
        "--port", str(port + 1), "--access-log", "/dev/null",
    )  # fmt: skip
    try:
        assert gateway_url.endswith(str(port + 1)), gateway_url
        yield Pair(Way(port), Way(port + 1), gateway.pid)
    finally:
        for child in (gateway, upstream):
            child.terminate()
            child.wait()


async def one_at_a_time(pair: Pair, requests: int) -> str:
    """Return a table of the time that the gateway adds to a single request."""
    rows = []
    for name, images, count in (
        ("text, streamed, 50 tokens", 0, requests),
        ("one 2 MB image", 1, requests // 2),
        ("8 images of 2 MB", 8, requests // 8),
    ):
        before = cpu_seconds(pair.pid)
        found = await pairs(pair.direct, pair.through, body_of(images, 2_000_000), count)
        used = (cpu_seconds(pair.pid) - before) / (count + 4) * 1e3
        d_first, d_end, g_first, g_end = map(median, found.values())
        rows.append(
            (name, f"{d_first:.2f} / {d_end:.2f}", f"{g_first:.2f} / {g_end:.2f}",
             f"{g_first - d_first:+.2f} ms ({g_first / d_first - 1:+.2%})",
             f"{g_end - d_end:+.2f} ms",
             f"{p99(found['g_first']) - p99(found['d_first']):+.2f} ms", f"{used:.1f} ms")
        )  # fmt: skip
    return table(
        "request | direct first / end, ms | gateway first / end, ms | added first | added end"
        " | p99 added first | gateway CPU a request",
        rows,
    )


async def all_at_once(pair: Pair) -> str:
    """Return a table of 256 streams at once, direct and through the gateway."""
    rows = []
    for name, way in (("direct", pair.direct), ("gateway", pair.through)) * 2:
        before = cpu_seconds(pair.pid)
        answers = await asyncio.gather(*(way.ask(body_of(0, 0)) for _ in range(256)))
        used = cpu_seconds(pair.pid) - before
        firsts, ends, events = zip(*answers, strict=True)
        cells = [f"{median(t) * 1e3:.0f} / {p99(t) * 1e3:.0f}" for t in (firsts, ends)]
        cpu = (f"{used / sum(events) * 1e6:.0f} µs", f"{used:.2f} s")
        rows.append((name, *cells, *(cpu if way is pair.through else ("", ""))))
    return table(
        "256 streams at once, 50 tokens each | first median / p99, ms | end median / p99, ms"
        " | gateway CPU a chunk | gateway CPU in all",
        rows,
    )


async def without_waiting(pair: Pair, requests: int) -> str:
    """Return a table of the added time with an upstream that answers immediately."""
    rows = []
    for name, images in (("text", 0), ("one 2 MB image", 1)):
        body = body_of(images, 2_000_000, stream=False)
        found = await pairs(pair.direct, pair.through, body, requests)
        direct, through = median(found["d_end"]), median(found["g_end"])
        rows.append((name, f"{direct:.2f}", f"{through:.2f}", f"{through - direct:+.2f} ms"))
    return table("upstream that answers at once | direct, ms | gateway, ms | added", rows)


async def memory_over(pair: Pair, requests: int) -> str:
    """Return a sentence on the gateway's speed and memory over ``requests`` requests."""
    body = body_of(1, 20_000, stream=False)
    await many(pair.through, body, 2000, 16, pair.pid)
    before, began = cpu_seconds(pair.pid), time.perf_counter()
    memory = await many(pair.through, body, requests, 16, pair.pid)
    took, used = time.perf_counter() - began, cpu_seconds(pair.pid) - before
    return (
        f"{requests:,} requests with a 20 kB image by 16 clients: {requests / took:.0f} a second, "
        f"{used / requests * 1e3:.2f} ms of gateway CPU each. Resident memory in MiB, before and "
        f"after each tenth: {', '.join(f'{m:.1f}' for m in memory)}."
    )


async def measure(args: argparse.Namespace, plan: Path) -> list[str]:
    limits = {"images": 8, "bytes_per_image": 8 << 20, "bytes_per_body": 100 << 20, "n": 8}
    plan.write_text(plan_for(TILES, **limits).to_json())  # one without a queue
    gpu = ("--first", "0.2", "--each", "0.02", "--tokens", "50")
    with pair(plan, args.port, *gpu) as both:
        lines = [await one_at_a_time(both, args.requests), "", await all_at_once(both), ""]
    idle = ("--first", "0", "--each", "0", "--tokens", "1")
    with pair(plan, args.port + 2, *idle) as both:
        lines += [await without_waiting(both, args.requests), ""]
        if args.memory:
            lines.append(await memory_over(both, args.memory))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.run", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--memory", type=int, default=0, help="requests of the memory test")
    parser.add_argument("--port", type=int, default=19300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(ran_on(), "", *asyncio.run(measure(args, Path(folder, "plan.json"))), sep="\n")


if __name__ == "__main__":
    main()
