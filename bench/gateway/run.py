"""Direct and through the gateway in one run, against an upstream paced like a GPU.

    python -m bench.gateway.run [--requests 200] [--memory 100000]

Requests alternate between the two ways, so that both see the same noise. The client is raw asyncio:
a library would cost more than the gateway does. CPU time is the gateway process's own, from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PATH = "/v1/chat/completions"
TICKS = os.sysconf("SC_CLK_TCK")


class Way:
    """A port, and idle connections to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, body: bytes) -> tuple[float, float, int]:
        """Seconds to the first event, to the end, and events."""
        reader, writer = await self._connection()
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
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


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def body_of(images: int, size: int, *, stream: bool = True) -> bytes:
    """A chat request with images of so many bytes each."""
    from bench.gateway.bench_pictures import noise_jpeg

    parts = [{"type": "text", "text": "What is this? " * 8}]
    for number in range(images):
        data = base64.b64encode(noise_jpeg(size, number)).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "stream": stream}
    return json.dumps({**body, "max_tokens": 64}).encode()


async def pairs(direct: Way, through: Way, body: bytes, count: int) -> dict[str, list[float]]:
    """Alternating requests, one at a time: milliseconds."""
    found: dict[str, list[float]] = {"d_first": [], "d_end": [], "g_first": [], "g_end": []}
    for number in range(count + 4):
        order = (("d", direct), ("g", through)) if number % 2 else (("g", through), ("d", direct))
        for name, way in order:
            first, end, _ = await way.ask(body)
            if number >= 4:
                found[f"{name}_first"].append(first * 1e3)
                found[f"{name}_end"].append(end * 1e3)
    return found


async def crowd(way: Way, body: bytes, count: int) -> tuple[list[float], list[float], int]:
    """All at once."""
    answers = await asyncio.gather(*(way.ask(body) for _ in range(count)))
    firsts, ends, events = zip(*answers, strict=True)
    return [f * 1e3 for f in firsts], [e * 1e3 for e in ends], sum(events)


async def many(way: Way, body: bytes, count: int, at_once: int, pid: int) -> list[float]:
    """So many requests by so many clients; the gateway's memory in MiB, eleven times."""
    memory, left = [rss_mib(pid)], [count]
    step = max(1, count // 10)

    async def client() -> None:
        while left[0] > 0:
            left[0] -= 1
            if left[0] % step == 0:
                memory.append(rss_mib(pid))
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


def plan_file() -> Path:
    """A plan without a queue that takes 8 images of 4 MiB."""
    from tests.support.gateway import TILES, plan_for

    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"gateway-bench-{os.getpid()}.json"
    limits = {"images": 8, "bytes_per_image": 8 << 20, "bytes_per_body": 100 << 20, "n": 8}
    path.write_text(plan_for(TILES, **limits).to_json())
    return path


def median(values: list[float]) -> float:
    return statistics.median(values)


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


class Pair:
    """A paced upstream and a gateway before it, each in a process of its own.

    Args:
        plan: the gateway's plan.
        port: of the upstream; the gateway takes the next one.
        pace: the upstream's options.
        access_log: the gateway's option.
    """

    def __init__(self, plan: Path, port: int, access_log: str, *pace: str) -> None:
        upstream, url = start("-m", "bench.gateway.paced", "--port", str(port), *pace)
        self._children = [upstream]
        gateway, gateway_url = start(
            "-m", "turbofit", "gateway", "--plan", str(plan), "--upstream", url,
            "--port", str(port + 1), "--access-log", access_log,
        )  # fmt: skip
        self._children.append(gateway)
        assert gateway_url.endswith(str(port + 1)), gateway_url
        self.direct, self.through, self.pid = Way(port), Way(port + 1), gateway.pid

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.terminate()
            child.wait()


async def one_at_a_time(pair: Pair, requests: int) -> list[str]:
    """Table: what a lonely request waits longer."""
    lines = [
        "| request | direct first / end, ms | gateway first / end, ms | added first | "
        "added end | p99 added first | gateway CPU a request |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, images, count in (
        ("text, streamed, 50 tokens", 0, requests),
        ("one 2 MB image", 1, requests // 2),
        ("8 images of 2 MB", 8, requests // 8),
    ):
        before = cpu_seconds(pair.pid)
        found = await pairs(pair.direct, pair.through, body_of(images, 2_000_000), count)
        used = (cpu_seconds(pair.pid) - before) / (count + 4) * 1e3
        added = median(found["g_first"]) - median(found["d_first"])
        lines.append(
            f"| {name} | {median(found['d_first']):.2f} / {median(found['d_end']):.2f} | "
            f"{median(found['g_first']):.2f} / {median(found['g_end']):.2f} | {added:+.2f} ms "
            f"({added / median(found['d_first']) * 100:+.2f} %) | "
            f"{median(found['g_end']) - median(found['d_end']):+.2f} ms | "
            f"{p99(found['g_first']) - p99(found['d_first']):+.2f} ms | {used:.1f} ms |"
        )
    return lines


async def all_at_once(pair: Pair) -> list[str]:
    """Table: 256 streams."""
    lines = [
        "| 256 streams at once, 50 tokens each | first median / p99, ms | end median / p99, "
        "ms | gateway CPU a chunk | gateway CPU in all |",
        "|---|---|---|---|---|",
    ]
    for name, way in (("direct", pair.direct), ("gateway", pair.through)) * 2:
        before = cpu_seconds(pair.pid)
        firsts, ends, events = await crowd(way, body_of(0, 0), 256)
        used = cpu_seconds(pair.pid) - before
        cpu = " | " if way is pair.direct else f"{used / events * 1e6:.0f} µs | {used:.2f} s"
        lines.append(
            f"| {name} | {median(firsts):.0f} / {p99(firsts):.0f} | {median(ends):.0f} / "
            f"{p99(ends):.0f} | {cpu} |"
        )
    return lines


async def without_waiting(pair: Pair, requests: int) -> list[str]:
    """Table: an upstream that answers at once."""
    lines = ["| upstream that answers at once | direct, ms | gateway, ms | added |"]
    lines.append("|---|---|---|---|")
    for name, images in (("text", 0), ("one 2 MB image", 1)):
        body = body_of(images, 2_000_000, stream=False)
        found = await pairs(pair.direct, pair.through, body, requests)
        direct, through = median(found["d_end"]), median(found["g_end"])
        lines.append(f"| {name} | {direct:.2f} | {through:.2f} | {through - direct:+.2f} ms |")
    return lines


async def memory_over(pair: Pair, requests: int) -> str:
    """A line: memory over so many requests."""
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


async def measure(args: argparse.Namespace) -> list[str]:
    plan = plan_file()
    lines: list[str] = []
    try:
        gpu = ("--first", "0.2", "--each", "0.02", "--tokens", "50")
        with Pair(plan, args.port, args.access_log, *gpu) as pair:
            lines += [*await one_at_a_time(pair, args.requests), ""]
            lines += [*await all_at_once(pair), ""]
        idle = ("--first", "0", "--each", "0", "--tokens", "1")
        with Pair(plan, args.port + 2, args.access_log, *idle) as pair:
            lines += [*await without_waiting(pair, args.requests), ""]
            if args.memory:
                lines.append(await memory_over(pair, args.memory))
    finally:
        plan.unlink()
    return lines


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"{os.cpu_count()} cores of {model[1] if model else 'unknown'}, Python "
        f"{platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.run", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--memory", type=int, default=0, help="requests of the memory test")
    parser.add_argument("--port", type=int, default=19300)
    parser.add_argument("--access-log", default="/dev/null")
    args = parser.parse_args()
    print(machine())
    print()
    print("\n".join(asyncio.run(measure(args))))


if __name__ == "__main__":
    main()
