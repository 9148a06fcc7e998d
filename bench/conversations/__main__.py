"""Measures conversations about pictures on pretend GPUs, without and with a prefix cache.

    python -m bench.conversations [--only LOAD ...] [--clock 8] [--write]

Each load runs twice: without a prefix cache, where any engine answers any turn, and with it, where
an engine keeps its conversations. Its lines of results.jsonl are replaced; ``--write`` only makes
RESULTS.md of them. A first token is told as (t - h) / N: N is the clock, and h is the host's own
time of the same turn, as ``--clock 0`` gives it. A user waits for h more.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench.clock.__main__ import Clocked, Servers, arguments
from bench.conversations.load import TURNS, Told, alike, drive
from bench.page import ran_on, table

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.jsonl", HERE / "RESULTS.md"
_WITHOUT, _WITH = ("--no-enable-prefix-caching",), ("--enable-prefix-caching",)
#: The share of the forecast's requests a second that arrives by chance.
_SHARE = 0.6
#: Seconds of the card after which an engine is killed.
_KILLED = 5.0


class Load(NamedTuple):
    """Conversations with a model; they begin by chance (``chance``) or within two seconds."""

    model: str
    on: str
    clients: int
    chance: bool = False
    pictures: bool = True
    kills: bool = False
    turns: int = TURNS


LOADS = {
    "2B, burst": Load("internvl2-2b", "4xrtx3090", 20),
    "2B, by chance": Load("internvl2-2b", "4xrtx3090", 20, chance=True),
    "8B, burst": Load("internvl2-8b", "4xrtx3090", 20),
    "8B, by chance": Load("internvl2-8b", "4xrtx3090", 20, chance=True),
    "8B, more than the cache holds": Load("internvl2-8b", "1xl4", 30),
    "2B, an engine killed": Load("internvl2-2b", "4xrtx3090", 20, kills=True),
    "2B, new pictures alone": Load("internvl2-2b", "1xrtx3090", 64, turns=1),
    "2B, all begin alike": Load("internvl2-2b", "4xrtx3090", 1000, pictures=False),
}


def host_seconds(servers: Servers, model: str, on: str) -> list[float]:
    """The host's own seconds to the first token of each turn, of one conversation after another."""
    card = f"1x{on.partition('x')[2]}"
    server = servers.start(model, card, 0.0, *_WITH)
    told = [asyncio.run(drive(server.url, 2, seed=seed)) for seed in range(3)]
    return [min(one.first[turn].p50 for one in told) for turn in range(TURNS)]


def begins_a_second(server: Clocked) -> float:
    """How many conversations begin in a second of the card at `_SHARE` of the forecast."""
    usual = server.plan.usual_image or None
    found = server.plan.throughput if usual is None else usual
    assert found is not None
    assert found.requests_per_second is not None
    return _SHARE * found.requests_per_second / TURNS


async def _driven(load: Load, server: Clocked, pid: int, factor: float) -> Told:
    if not load.pictures:
        return await alike(server.url, load.clients)
    rate = begins_a_second(server) if load.chance else None
    driving = asyncio.ensure_future(drive(server.url, load.clients, rate=rate, turns=load.turns))
    if load.kills:
        await asyncio.sleep(_KILLED * factor)
        words = ("pgrep", "-P", str(pid), "-f", "turbomind.server")
        engines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
        os.kill(int(engines[0]), signal.SIGKILL)
    return await driving


def measure(servers: Servers, name: str, factor: float) -> list[dict[str, Any]]:
    """The lines of one load."""
    load, lines = LOADS[name], []
    host = host_seconds(servers, load.model, load.on) if load.pictures else [0.0] * TURNS
    for what, words in (("without", _WITHOUT), ("with", _WITH)):
        server = servers.start(load.model, load.on, factor, *words)
        pid = servers.children[-1].process.pid
        told = asyncio.run(_driven(load, server, pid, factor))
        line = {"load": name, "what": what, "factor": factor, "host": host, "cpu": os.getloadavg()}
        for key in ("first", "whole"):
            line[key] = [(one.p50, one.p90) for one in getattr(told, key)]
        line |= {"cached": told.cached, "rate": told.rate, "late": told.late, "failed": told.failed}
        lines.append(line)
        print(json.dumps(line), flush=True)
    return lines


def _beyond(line: dict[str, Any], turn: int) -> str:
    """The p50 and p90 of a turn's first token beyond the host's time, in seconds of the card.

    Empty for a turn that nobody took.
    """
    if not any(line["first"][turn]):
        return ""
    own = line["host"][turn] / line["factor"]
    return " / ".join(f"{max(0.0, value - own):.2f}" for value in line["first"][turn])


def write() -> None:
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()]
    titles = "load | prefix cache | turn 1 | 2 | 3 | 4 | h | requests/s | from the cache | failed"
    rows = [
        (
            line["load"], line["what"], *(_beyond(line, turn) for turn in range(TURNS)),
            " ".join(f"{own:.2f}" for own in line["host"]), f"{line['rate']:.2f}",
            " ".join(f"{share:.0%}" for share in line["cached"]), sum(line["failed"].values()),
            f"{line['late']:.1%}", f"{line['cpu'][0]:.0f}",
        )
        for line in lines
    ]  # fmt: skip
    before = PAGE.read_text().partition("\n## Figures")[0] if PAGE.exists() else "# Conversations"
    text = table(f"{titles} | held up | load", rows, right="23456789")
    PAGE.write_text(f"{before.rstrip()}\n\n## Figures\n\n{ran_on('lmdeploy')}.\n\n{text}\n")


def run(names: list[str], factor: float) -> None:
    known = (
        [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    with tempfile.TemporaryDirectory(prefix="turbofit-bench-turns-") as folder:
        servers = Servers(Path(folder))
        for name in names:
            try:
                lines = measure(servers, name, factor)
            finally:
                servers.end()
            known = [line for line in known if line["load"] != name] + lines
            RESULTS.write_text("".join(f"{json.dumps(line)}\n" for line in known))


def main() -> None:
    given = arguments(prog="python -m bench.conversations", description=__doc__, names=LOADS)
    if not given.write:
        run(given.only, given.clock)
    write()


if __name__ == "__main__":
    main()
