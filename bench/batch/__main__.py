"""Does `turbofit batch` lose or double an item, grow with its input, or slow a server down?

    python -m bench.batch                                # everything, 13 minutes
    python -m bench.batch --only kills --items 10000     # one part, smaller
    python -m bench.batch --write                        # and RESULTS.md

*kills*: client and server are killed (SIGKILL) 20 times each at random moments. *memory*: the same
command on inputs of growing length. *throughput*: beside as many plain clients as it has requests
at once. *lmdeploy*: images through LMDeploy's server on a pretend GPU, whose engine is killed in
the middle; it needs LMDeploy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from bench.batch.parties import Client, Server, missing_and_doubled, write_input
from bench.common.serving import start_turbofit
from turbofit.launch.engine.image import flat_png

RESULTS = Path(__file__).with_name("RESULTS.md")
PARTS = ("kills", "memory", "throughput", "lmdeploy")
AT_ONCE = 64
BAR = 0.02
KILLS = 20
#: What a client may have in memory at a million lines more than at ten thousand, in MiB: a table of
#: names (12 to 24 bytes a line), a digest and a bit a line.
FLAT = 32
MIB = 1 << 20


def kills(folder: Path, items: int, seed: int) -> list[str]:
    """Both are killed at moments that the seed draws: when so many lines are written."""
    source, output = write_input(folder / "in.jsonl", items), folder / "out.jsonl"
    draw = random.Random(seed)
    moments = sorted((draw.randrange(items), who) for who in "cs" for _ in range(KILLS))
    server = Server(0.05)
    options = ("--url", server.url, "--concurrency", str(AT_ONCE))
    client, peak, counted, at, began = Client(source, output, *options), 0, 0, 0, time.monotonic()
    while True:
        running = client.look()
        peak = max(peak, client.peak)
        if output.exists() and (size := output.stat().st_size) > at:
            counted += _newlines(output, at, size)
            at = size
        if moments and counted >= moments[0][0]:
            _, who = moments.pop(0)
            (client if who == "c" else server).kill()
            time.sleep(draw.uniform(0.0, 0.5))
            if who == "c":
                client = Client(source, output, *options)
                at = counted = 0  # a torn line is cut off
            else:
                server.start()
        elif not running:
            break
        time.sleep(0.005)
    client.result()
    server.kill()
    seconds = time.monotonic() - began
    lost, doubled, strange = missing_and_doubled(output, items)
    assert not moments
    print(f"kills: {lost} lost, {doubled} doubled, {strange} strange, {seconds:.0f} s", flush=True)
    if lost or doubled or strange:
        raise SystemExit("an item is lost, doubled or another's")
    return [
        f"| {items:,} items, client and server killed {KILLS} times each, seed {seed} "
        f"| {lost} lost, {doubled} doubled, {strange} with another's answer; peak memory of the "
        f"client {peak / MIB:.0f} MiB; {seconds:.0f} s |"
    ]


def _newlines(path: Path, begin: int, end: int) -> int:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin).count(b"\n")


def memory(folder: Path, items: int, _seed: int) -> list[str]:
    """Peak memory over the input's length, and of another start that finds all answered."""
    rows, peaks = [], []
    server = Server(0.0)
    for count in (items // 10, items, items * 10):
        source, output = write_input(folder / f"{count}.jsonl", count), folder / f"{count}.out"
        for what in ("sent", "found answered"):
            client = Client(
                source,
                output,
                "--url",
                server.url,
                "--concurrency",
                str(AT_ONCE),
                "--timeout",
                "600",
            )
            while client.look():
                time.sleep(0.05)
            said = client.result()
            assert said["answered"] == count
            rate = f", {said['items_per_second']:,.0f} items/s" if what == "sent" else ""
            print(f"memory: {count:,} {what}: {client.peak / MIB:.1f} MiB{rate}", flush=True)
            rows.append(f"| {count:,} lines {what} | peak {client.peak / MIB:.0f} MiB{rate} |")
            peaks.append(client.peak)
        output.unlink()
        source.unlink()
    server.kill()
    if max(peaks) - peaks[0] > FLAT * MIB:
        raise SystemExit(f"memory grows by {(max(peaks) - peaks[0]) / MIB:.0f} MiB")
    return rows


def throughput(folder: Path, items: int, _seed: int) -> list[str]:
    """Items a second beside plain clients, which ask one after the other, by turns."""
    count = items // 10
    source, server = write_input(folder / "in.jsonl", count), Server(0.2)
    bodies = [json.dumps(json.loads(line)["body"]).encode() for line in source.open()]
    ratios, rates = [], []
    for turn in range(3):
        plain = asyncio.run(_plain(server.url, bodies))
        client = Client(
            source, folder / f"out-{turn}", "--url", server.url, "--concurrency", str(AT_ONCE)
        )
        rate = client.result()["items_per_second"]
        print(f"throughput: {rate:.1f}/s, plain clients {plain:.1f}/s", flush=True)
        ratios.append(rate / plain - 1)
        rates.append((rate, plain))
    server.kill()
    worst = min(ratios)
    rate, plain = rates[ratios.index(worst)]
    if worst < -BAR:
        raise SystemExit(f"slower than plain clients by {-worst:.1%}")
    return [
        f"| {count:,} items, {AT_ONCE} at once, a server that takes 200 ms, the worst of three "
        f"| {rate:.1f}/s; {AT_ONCE} plain clients {plain:.1f}/s ({worst:+.1%}; bar −{BAR:.0%}) |"
    ]


async def _plain(url: str, bodies: list[bytes]) -> float:
    left, began = iter(bodies), time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def one() -> None:
            for body in left:
                async with session.post(f"{url}/v1/chat/completions", data=body) as response:
                    assert response.status == 200
                    await response.json()

        await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return len(bodies) / (time.perf_counter() - began)


def lmdeploy(folder: Path, items: int, seed: int) -> list[str]:
    """Images through LMDeploy's server on a pretend card; its engine dies in the middle."""
    count, draw = items // 200, random.Random(seed)
    photos, output = folder / "photos", folder / "out.jsonl"
    photos.mkdir()
    for number in range(count):
        size = draw.choice((224, 448, 896)), draw.choice((224, 448, 1344))
        (photos / f"{number:04}.png").write_bytes(flat_png(*size))
    children: list = []
    child = start_turbofit(
        children, folder / "state", "batch", str(photos), str(output), "--model", "internvl2-2b",
        "--on", "1xrtx3090", "--pretend", "--prompt", "What is {stem}?", "--max-tokens", "8",
    )  # fmt: skip
    began = time.monotonic()
    try:
        engine = int(child.wait_for("(process ").partition("(process ")[2].partition(",")[0])
        child.wait_for("phase: ready")
        while output.read_bytes().count(b"\n") < count // 2:
            time.sleep(0.05)
        os.kill(engine, signal.SIGKILL)
        code = child.finish()
    finally:
        child.kill()
    seconds = time.monotonic() - began
    names = [json.loads(line)["custom_id"] for line in output.open()]
    failed = sum(json.loads(line)["error"] is not None for line in output.open())
    starts = sum("(process " in line for line in child.lines)
    print(f"lmdeploy: {len(set(names))} of {count}, {failed} failed, {starts} starts", flush=True)
    if code or len(set(names)) != count or len(names) != count or failed or starts != 2:
        raise SystemExit(child.stderr)
    return [
        f"| {count} images through LMDeploy's server and engine on a pretend RTX 3090, the engine "
        f"killed after {count // 2} | {count} answered, 0 lost, 0 doubled, 0 failed; {starts} "
        f"starts of the engine, {seconds:.0f} s |"
    ]


def report(rows: list[str], items: int) -> str:
    """RESULTS.md."""
    return "\n".join(
        (
            "# `turbofit batch`",
            "",
            f"Made by `python -m bench.batch --items {items} --write` on "
            f"{time.strftime('%Y-%m-%d')}: 2 cores",
            "of an AMD EPYC with other work beside it, the client and the stand-in server among "
            "them. Peak",
            "memory is VmHWM, of Python and its packages too.",
            "",
            "| what | result |",
            "|---|---|",
            *rows,
            "",
            "The stand-in answers each request with its own text, so that an answer that came to "
            "another item",
            "would be seen. What was under way at a kill is sent again: the server sees it twice, "
            "the output",
            "has it once. `vllm run-batch` was not measured beside it: vLLM is not installed here.",
            "",
        )
    )


def main() -> int:
    """0 where nothing is lost and all bars are met."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__)
    parser.add_argument("--items", type=int, default=100_000, help="of the kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=PARTS, action="append", help="repeatable")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            rows += globals()[name](Path(folder), arguments.items, arguments.seed)
    if arguments.write:
        RESULTS.write_text(report(rows, arguments.items))
    return 0


if __name__ == "__main__":
    sys.exit(main())
