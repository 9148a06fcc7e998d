"""``python -m bench.speed.server_cost PORT PID``: what LMDeploy's event loop costs a request.

LMDeploy's api_server on a pretend GPU, which computes nothing: `turbofit serve qwen2.5-0.5b --on
1xrtx4090 --pretend --no-gateway --port PORT`; PID is the api_server's. A closed load of streamed
chats; the CPU time of the server's main thread over the requests. Tokens that come while the loop
is busy share an event, so that the loop bounds requests a second and not tokens a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Final

#: Streams at once, requests, and tokens of an answer.
LOADS: Final = ((8, 64, 256), (64, 256, 256), (128, 256, 256), (64, 512, 16), (128, 256, 512))
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Of the main thread, which runs the event loop."""
    text = Path(f"/proc/{pid}/task/{pid}/stat").read_text(encoding="utf-8")
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def ask(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    """One request on a connection of its own; the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    return answer


async def measured(port: int, pid: int, load: tuple[int, int, int], model: str) -> str:
    """A line of the table."""
    streams, requests, tokens = load
    chat = {"model": model, "max_tokens": tokens, "ignore_eos": True, "stream": True,
            "messages": [{"role": "user", "content": "Tell me a story."}]}  # fmt: skip
    turn, events = asyncio.Semaphore(streams), 0

    async def one() -> None:
        nonlocal events
        async with turn:
            answer = await ask(port, "POST", "/v1/chat/completions", json.dumps(chat).encode())
        if b"[DONE]" not in answer:
            raise RuntimeError(f"the server answered {answer[:200]!r}")
        events += answer.count(b"data: ")

    await one()
    events, began = 0, cpu_seconds(pid)
    await asyncio.gather(*(one() for _ in range(requests)))
    spent = cpu_seconds(pid) - began
    return f"| {streams} | {tokens} | {events / requests:.0f} | {1000 * spent / requests:.1f} |"


async def table(port: int, pid: int) -> None:
    """Print all loads."""
    answer = await ask(port, "GET", "/v1/models")
    model = json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])["data"][0]["id"]
    print("| streams | tokens of an answer | events of an answer | CPU ms of the loop a request |")
    print("|---|---|---|---|")
    for load in LOADS:
        print(await measured(port, pid, load, model))


def main() -> None:
    """Measure a server that runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.server_cost", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("pid", type=int)
    args = parser.parse_args()
    asyncio.run(table(args.port, args.pid))


if __name__ == "__main__":
    main()
