"""LMDeploy's front end alone, in its own way and in turbofit's: no engine, no server.

    python -m bench.images.alone [--families Gemma3 ...] [--size 1920x1080] [--threads 2] [--write]

Each row is two processes by turns: LMDeploy's `ImageEncoder` over a tiny checkpoint of the family
with the processor of the published one decodes and prepares pictures, 8 under way at once, and no
picture comes twice. So are measured families too that no pretend engine runs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.images.__main__ import CLIENTS, page, photograph
from bench.page import table
from tests.support.front_ends import CHECKPOINTS

#: Prepared images are dropped soon, as in a server that has been up for a while.
KEPT = 64 << 20
HEAD = (
    "family | ms of processor time an image: plain | turbofit | share"
    " | images/s: plain | turbofit | times"
)


def encoder_of(family: str, folder: Path) -> Any:
    """LMDeploy's encoder of a tiny checkpoint; it prepares alike for both engines."""
    from turbofit.rehearse.turbomind.hooks import declare_torchvision

    declare_torchvision()
    from lmdeploy import PytorchEngineConfig
    from lmdeploy.vl import engine

    engine.is_bf16_supported = lambda *_: True
    CHECKPOINTS[family](folder)
    config = PytorchEngineConfig(dtype="bfloat16")
    return engine.ImageEncoder(str(folder), "pytorch", backend_config=config)


async def prepare_one(encoder: Any, picture: bytes) -> None:
    """A request's picture, from its data URL to what an engine is given."""
    from lmdeploy.serve.processors import MultimodalProcessor

    encoded = base64.b64encode(picture + os.urandom(8)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    messages = await MultimodalProcessor.async_parse_multimodal_item(messages)
    if encoder._uses_new_preprocess:
        await encoder.preprocess(messages, encoder.model.image_token, {})
    else:
        await encoder.preprocess(messages)


async def turn(encoder: Any, picture: bytes, count: int) -> tuple[float, float]:
    """Processor seconds of an image, and images a second."""
    places = asyncio.Semaphore(CLIENTS)

    async def placed() -> None:
        async with places:
            await prepare_one(encoder, picture)

    spent, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(placed() for _ in range(count)))
    return (time.process_time() - spent) / count, count / (time.perf_counter() - began)


def serve_turns(family: str, threads: int, size: str, count: int) -> None:
    """A turn for each line of standard input: what `Way` starts."""
    from turbofit.launch.images.preparation import prepare
    from turbofit.launch.images.resize import quicken

    with tempfile.TemporaryDirectory() as folder:
        encoder = encoder_of(family, Path(folder) / "model")
        if threads > 1:
            if why := prepare(encoder, threads, KEPT):
                raise SystemExit(why)
            quicken(encoder.model)
        picture = photograph(size)
        for _ in sys.stdin:
            print(json.dumps(asyncio.run(turn(encoder, picture, count))), flush=True)


class Way:
    """A process that prepares so many pictures of one family each time that it is asked."""

    def __init__(self, family: str, threads: int, size: str, count: int) -> None:
        words = (family, str(threads), size, str(count))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.images.alone", "--one", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def turn(self) -> tuple[float, float] | None:
        """What one took; None where it has failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in self._process.stdout:
            if line.startswith("["):  # LMDeploy prints, too
                cpu, rate = json.loads(line)
                return cpu, rate
        return None

    def end(self) -> str:
        """End it; its last words."""
        _, text = self._process.communicate()
        return (text.strip().splitlines() or [""])[-1]


def compared(family: str, args: argparse.Namespace) -> list[str]:
    """A family's row."""
    name = family.removesuffix("ForConditionalGeneration")
    ways = [Way(family, threads, args.size, args.count) for threads in (1, args.threads)]
    turns: list[list[tuple[float, float]]] = [[], []]
    for number in range(args.rounds + 1):
        for way, taken in zip(ways, turns, strict=True):
            one = way.turn()
            if one is not None and number:  # the first warms up
                taken.append(one)
    last = [way.end() for way in ways]
    if not all(turns):
        return [name, next(filter(None, last), "?")[:100], *[""] * 5]
    (cpu, rate), (our_cpu, our_rate) = (
        (median(c for c, _ in taken), median(r for _, r in taken)) for taken in turns
    )
    return [
        name, f"{cpu * 1e3:.0f}", f"{our_cpu * 1e3:.0f}", f"{our_cpu / cpu:.2f}",
        f"{rate:.1f}", f"{our_rate:.1f}", f"{our_rate / rate:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.images.alone", description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(CHECKPOINTS), metavar="NAME")
    parser.add_argument("--size", default="1920x1080")
    parser.add_argument("--threads", type=int, default=2, help="turbofit's (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--count", type=int, default=16, help="pictures of a turn")
    parser.add_argument("--write", action="store_true", help="write the table to ALONE.md")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        family, threads, size, count = args.one
        serve_turns(family, int(threads), size, int(count))
        return
    rows, loads = [], []
    for family in args.families:
        rows.append(compared(family, args))
        loads.append(os.getloadavg()[0])
        print(*rows[-1], sep="\t", flush=True)
    how = (
        f"JPEGs of {args.size}, {CLIENTS} under way, medians of {args.rounds} turns of"
        f" {args.count}; turbofit with {args.threads} threads."
    )
    title = "What an image costs LMDeploy's front end alone"
    text = page(title, how, loads, table(HEAD, rows, right="123456"))
    print(text)
    if args.write:
        Path(__file__).with_name("ALONE.md").write_text(text)


if __name__ == "__main__":
    main()
