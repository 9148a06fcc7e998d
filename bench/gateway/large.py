"""Text beside many large pictures: how long it waits, and what a picture costs the gateway.

    python -m bench.gateway.large [--pictures 100]

A process of its own asks text, one request after the other, of the upstream and of the gateway by
turns: first alone, then while the pictures, all sent at once, are under way. What the upstream's
own text waits meanwhile is the machine's noise. Processor time is the gateway process's own, and
that of its loop's passes (`bench.gateway.passes`), which does not depend on what runs beside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from base64 import b64encode
from io import BytesIO
from statistics import median
from typing import Any

from PIL import Image

from bench.gateway.run import ROOT, Pair, Way, body_of, p99, plan_file
from bench.page import ran_on, table
from bench.proc import cpu_seconds
from tests.support.gateway import CHAT, data_url

PASSES = ("-m", "bench.gateway.passes")
MESSAGES = "/v1/messages"
SIDES = (4000, 3000)
#: Texts that are asked of each way before the pictures.
ALONE = 300


def photograph(kind: str) -> bytes:
    """A file of 12 megapixels: soft areas with a sensor's noise over them."""
    soft = Image.frombytes("RGB", (250, 188), os.urandom(250 * 188 * 3)).resize(SIDES)
    noise = Image.effect_noise(SIDES, 8)
    photo = Image.blend(soft, noise.convert("RGB"), 0.15)
    file = BytesIO()
    photo.save(file, kind, **({"quality": 90} if kind == "JPEG" else {"compress_level": 1}))
    return file.getvalue()


def block(data: bytes, mime: str) -> dict[str, Any]:
    """The picture as Anthropic's API has it, in which no parameter can hold it."""
    source = {"type": "base64", "media_type": mime, "data": b64encode(data).decode()}
    return {"type": "image", "source": source}


class Texts:
    """A process that asks text of some ports by turns, one request after the other."""

    def __init__(self, *ports: int) -> None:
        words = [sys.executable, "-m", "bench.gateway.large", "--texts", *map(str, ports)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    async def some(self) -> None:
        """Until it has asked as many as are wanted alone."""
        assert self._process.stdout is not None
        await asyncio.to_thread(self._process.stdout.readline)

    def end(self) -> list[list[float]]:
        """Milliseconds of each, by port."""
        text, _ = self._process.communicate()
        taken: list[list[float]] = json.loads(text)
        return taken


async def texts(ports: list[int]) -> None:
    """What the process of `Texts` does until its standard input ends."""
    ways, body = [Way(port) for port in ports], body_of(0, 0, stream=False)
    taken: list[list[float]] = [[] for _ in ports]
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    while not ended.done():
        for way, times in zip(ways, taken, strict=True):
            _, end, _ = await way.ask(body)
            times.append(end * 1e3)
        if len(taken[0]) == ALONE:
            print("enough", flush=True)
    print(json.dumps(taken))


async def beside(pair: Pair, body: bytes, path: str, count: int) -> list[object]:
    """A row: text alone and beside so many pictures, both ways; processor time of a picture."""
    client = Texts(pair.direct.port, pair.through.port)
    await client.some()
    before, began = cpu_seconds(pair.pid), time.perf_counter()
    await asyncio.gather(*(pair.through.ask(body, path) for _ in range(count)))
    took, used = time.perf_counter() - began, cpu_seconds(pair.pid) - before
    cells: list[object] = []
    for times in client.end():
        alone, loaded = times[20:ALONE], times[ALONE:]
        cells.append(" → ".join(_spread(part) for part in (alone, loaded)))
    return [*cells, f"{used / count * 1e3:.1f} ms", f"{took:.1f} s"]


def _spread(times: list[float]) -> str:
    return f"{median(times):.1f} / {p99(times):.1f} / {max(times):.1f} ({len(times)})"


async def measure(args: argparse.Namespace) -> str:
    # Two tiles are paid for, and a block of Anthropic's API cannot say so to an engine.
    plan, rows = plan_file(limit=2, bytes_per_image=64 << 20), []
    idle = ("--first", "0", "--each", "0", "--tokens", "1")
    passes = plan.with_suffix(".passes")
    for number, (kind, path, count, what) in enumerate(
        (
            ("JPEG", CHAT, args.pictures, "passed on"),
            ("PNG", CHAT, max(1, args.pictures // 10), "passed on"),
            ("JPEG", MESSAGES, args.pictures, "resized"),
        )
    ):
        data, mime = photograph(kind), f"image/{kind.lower()}"
        part = {"type": "image_url", "image_url": {"url": data_url(data, mime)}}
        part = part if path == CHAT else block(data, mime)
        message = {"role": "user", "content": [part]}
        body = json.dumps({"model": "m", "max_tokens": 64, "messages": [message]}).encode()
        ports = args.port + 2 * number
        with Pair(plan, ports, "/dev/null", *idle, program=(*PASSES, str(passes))) as pair:
            row = await beside(pair, body, path, count)
        longest: list[float] = json.loads(passes.read_text())
        spread = f"{longest[0]:.0f} / {sum(one > 20 for one in longest)} / {len(longest):,}"
        rows.append((f"{count} {kind}s of {len(data) / 1e6:.1f} MB, {what}", *row, spread))
    passes.unlink()
    plan.unlink()
    return table(
        "pictures of 12 megapixels at once"
        " | text of the upstream: median / p99 / most in ms (number), alone → beside"
        " | text of the gateway | gateway CPU a picture | all answered in"
        " | passes of the loop: longest in ms, number over 20 ms, all",
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.large", description=__doc__)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--port", type=int, default=19400)
    parser.add_argument("--texts", type=int, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.texts:
        asyncio.run(texts(args.texts))
    else:
        print(ran_on(), "", asyncio.run(measure(args)), sep="\n")


if __name__ == "__main__":
    main()
