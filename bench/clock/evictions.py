"""Requests whose answers grow long where images wait: evictions, and the largest forward.

    python -m bench.clock.evictions [--requests 2000] [--clock 0.25]

One request of seven has a picture. Most state no length, and get all tokens that they may
have, so more tokens run than the cache holds. LMDeploy's log says how often a request began or came
back, and how many pictures met in a forward. A death is one of the engine's process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

from bench.clock.__main__ import Servers
from bench.clock.forms import SIZE
from bench.clock.loads import Client, photograph, question
from turbofit.serving.plan_gateway import bounds_of

SERVED = ("internvl3-2b", "1xrtx3090:free=6GiB")
#: More rows than the cache holds; a request that states no length has four times these tokens.
OPTIONS = ("--max-batch-size", "40", "--output-tokens", "128")
#: Clients; the share of requests with a picture, and of those that state a length.
AT_ONCE, WITH_PICTURE, STATED = 64, 0.15, 0.2
#: Words of a text alone, at most; each is some tokens.
_WORDS = 1000
#: In LMDeploy's log: a request is let in or comes back; tiles of a forward.
_LET_IN = re.compile(r"scheduler\.cc.*\(uid (\d+)\) resume")
_TILES = re.compile(r"InternViT setup: .* patches=(\d+)")


async def send(url: str, count: int) -> dict[str, int]:
    """Send the requests; return how many were answered, by status."""
    draw, told = random.Random(131), dict[str, int]()
    async with Client(url) as client:

        async def place(left: Any) -> None:
            for _ in left:
                body = _body(client.model, draw)
                path = url + "/v1/chat/completions"
                async with client.session.post(path, json=body) as response:
                    await response.read()
                told[str(response.status)] = told.get(str(response.status), 0) + 1

        left = iter(range(count))
        await asyncio.gather(*(place(left) for _ in range(AT_ONCE)))
    return told


def _body(model: str, draw: random.Random) -> dict[str, Any]:
    text = f"{draw.getrandbits(64)} " + "why " * draw.randint(1, _WORDS)  # no two begin alike
    messages: list[Any] = [{"role": "user", "content": text}]
    if draw.random() < WITH_PICTURE:
        messages = question(photograph(*SIZE))
    stated = {"max_tokens": draw.randint(16, 256)} if draw.random() < STATED else {}
    return {"model": model, "messages": messages, **stated, "ignore_eos": True}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.clock.evictions", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clock", type=float, default=0.25)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="turbofit-bench-evictions-") as folder:
        servers = Servers(Path(folder))
        try:
            server = servers.start(*SERVED, given.clock, *OPTIONS)
            told = asyncio.run(send(server.url, given.requests))
            (run,) = Path(folder).glob("0/turbofit/runs/*")
            logs = run.glob("engine-0.log*")
            text = "".join(log.read_text(errors="replace") for log in logs)
            starts = json.loads((run / "run.json").read_text())["attempts"]
        finally:
            servers.end()
    let_in = _LET_IN.findall(text)
    tiles = [int(found) for found in _TILES.findall(text)]
    print(json.dumps({
        "answered": told, "evictions": len(let_in) - len(set(let_in)), "most tiles": max(tiles),
        "gate": bounds_of(server.plan).gate, "tokens": server.plan.engines[0].kv.tokens,
        "starts": len(starts),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
