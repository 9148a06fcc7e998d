"""Compares what images cost plain LMDeploy and turbofit, by turns, on pretend cards.

    python -m bench.images [--models internvl2-2b ...] [--sizes 1920x1080 ...] [--write]

The card takes no time there, so the host is the limit. Both servers run at once and are asked in
turns, so that both see the same noise; the load runs on the same cores. No picture comes twice.
Processor time is that of the engine's process and its children. Plain is ``--image-threads 1``:
LMDeploy's own way in all. The cache is soon full, as in a server that has been up for a while.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image

from bench.page import ran_on, table
from bench.proc import cpu_seconds
from tests.support.processes import HANG, pids
from tests.support.serving import Served, serve_pretend

#: LMDeploy's front end for LLaVA-v1.6 does not start (docs/models.md), and there is no stand-in of
#: Gemma 3's weights for the pretend engine.
MODELS = ("internvl2-2b", "qwen2.5-vl-7b")
SIZES = ("448x448", "1920x1080", "4000x3000")
WAYS = ("plain", "turbofit")
#: Requests at once.
CLIENTS = 8
HEAD = (
    "model | image | ms of processor time an image: plain | turbofit | share"
    " | requests/s: plain | turbofit | times"
)


class Turn(NamedTuple):
    """The figures of one turn: processor seconds for each image, and requests a second."""

    cpu: float
    rate: float


def photograph(size: str) -> bytes:
    """Return a JPEG with as much detail as a photograph, about 2 bits a pixel."""
    width, height = map(int, size.split("x"))
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    data = io.BytesIO()
    small.resize((width, height)).save(data, "JPEG", quality=85)
    return data.getvalue()


def ask(served: Served, model: str, picture: bytes) -> None:
    """Send a request; random bytes behind the JPEG's end make it another picture each time."""
    encoded = base64.b64encode(picture + os.urandom(8)).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
    content = [{"type": "text", "text": "What is it?"}, image]
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": content}]}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=HANG)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {text[:500].decode()}")
    finally:
        connection.close()


def spent(pid: int) -> float:
    """Return the processor seconds of a process and of all its living children."""
    seconds = cpu_seconds(pid)
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            children = (task / "children").read_text().split()
            seconds += sum(map(spent, map(int, children)))
    return seconds


def turn(served: Served, model: str, picture: bytes, count: int) -> Turn:
    (pid,) = pids(served.child)
    before, began = spent(pid), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        for answered in [clients.submit(ask, served, model, picture) for _ in range(count)]:
            answered.result()
    seconds = time.perf_counter() - began
    return Turn((spent(pid) - before) / count, count / seconds)


def compared(model: str, given: argparse.Namespace) -> list[list[str]]:
    """Measure both ways for a model; returns a table row for each size."""
    options = {"plain": ("--image-threads", "1"), "turbofit": ("--image-cache", given.image_cache)}
    rows, children = [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for way in WAYS:
            words = (model, "--on", given.on, "--no-gateway", "--check", "none", *options[way])
            servers[way] = serve_pretend(children, folder / way, *words)
            stack.callback(children[-1].kill)
        for served in servers.values():
            served.wait()
        name = servers["plain"].ask("/v1/models")[2]["data"][0]["id"]
        for size in given.sizes:
            picture, turns = photograph(size), {way: [] for way in WAYS}
            for number in range(given.rounds + 1):
                for way, served in servers.items():
                    taken = turn(served, name, picture, given.count)
                    if number:  # the first warms up
                        turns[way].append(taken)
            cpu = {way: median(taken.cpu for taken in turns[way]) for way in WAYS}
            rate = {way: median(taken.rate for taken in turns[way]) for way in WAYS}
            rows.append([
                model, size, f"{cpu['plain'] * 1e3:.0f}", f"{cpu['turbofit'] * 1e3:.0f}",
                f"{cpu['turbofit'] / cpu['plain']:.2f}", f"{rate['plain']:.1f}",
                f"{rate['turbofit']:.1f}", f"{rate['turbofit'] / rate['plain']:.2f}",
            ])  # fmt: skip
            print(*rows[-1], sep="\t", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.images", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument(
        "--on", default="1xa100-80g", help="the pretend card (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--count", type=int, default=16, help="requests of a turn")
    parser.add_argument("--image-cache", default="64MiB", help="turbofit's, %(default)s")
    parser.add_argument("--write", action="store_true", help="write the table to RESULTS.md")
    given = parser.parse_args()
    rows, loads = [], [os.getloadavg()[0]]
    for model in given.models:
        rows += compared(model, given)
        loads.append(os.getloadavg()[0])
    text = (
        f"# What an image costs\n\n"
        f"{ran_on('lmdeploy', 'transformers', 'torch', 'torchvision', 'pillow')}; load average"
        f" {min(loads):.1f} to {max(loads):.1f}, this bench's own among it. Medians of"
        f" {given.rounds} turns of {given.count} requests, {CLIENTS} at once, on a pretend"
        f" {given.on}; turbofit keeps {given.image_cache} of prepared images.\n\n"
        f"{table(HEAD, rows, right='234567')}\n"
    )
    print(text)
    if given.write:
        Path(__file__).with_name("RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
