"""Stand-in engines with batch slots, all in one process; no model and no GPU.

    python -m bench.gateway.slotted --port 9100 --speeds 1 1 1 0.5

A request waits for one of an engine's slots in turn, is silent for its first part, then sends nine
events. How long it takes is a number of the request's own (``user`` of its body), so that every
router is given the same work; an engine of half the speed takes twice as long. What carries no such
number (a probe) is answered at once. ``GET /stats`` tells what each engine did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
from collections import deque

from bench.gateway.paced import _EVENT, _MODELS, Paced

SLOTS = 4
EVENTS = 9
NUMBER = re.compile(rb'"user"\s*:\s*"(\d+)"')


def service(number: int, mean: float) -> tuple[float, float]:
    """Seconds until the first event and between the others, at speed 1: lognormal, sigma 0.7."""
    dice = random.Random(number)
    total = mean * dice.lognormvariate(-0.245, 0.7)
    return total * 0.3, total * 0.7 / (EVENTS - 1)


class State:
    """One engine."""

    def __init__(self, speed: float, mean: float) -> None:
        self.speed, self.mean = speed, mean
        self.free, self.line = SLOTS, deque()
        self.requests, self.busy, self.waited = 0, 0.0, 0.0

    async def enter(self) -> None:
        if self.free:
            self.free -= 1
            return
        self.line.append(asyncio.get_running_loop().create_future())
        await self.line[-1]

    def leave(self) -> None:
        while self.line:
            turn = self.line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1


class Slotted(Paced):
    """One connection to one engine."""

    states: list[State]

    def __init__(self, state: State) -> None:
        self.state = state

    async def answer(self, body: bytes) -> None:
        if body.startswith(b"GET /stats"):
            rows = [[one.requests, one.busy, one.waited, one.speed] for one in self.states]
            self.whole(json.dumps(rows).encode())
            return
        found = NUMBER.search(body)
        if body.startswith(b"GET ") or found is None:
            self.whole(_MODELS if b"/v1/models" in body[:40] else b"{}")
            return
        state, clock = self.state, asyncio.get_running_loop().time
        first, each = (seconds / state.speed for seconds in service(int(found[1]), state.mean))
        came = clock()
        await state.enter()
        began = clock()
        state.requests += 1
        state.waited += began - came
        try:
            await self.stream(began, first, each)
        finally:
            state.busy += clock() - began
            state.leave()

    async def stream(self, began: float, first: float, each: float) -> None:
        clock, write = asyncio.get_running_loop().time, self.transport.write
        write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        chunk = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
        for number in range(EVENTS):
            wait = began + first + number * each - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            if self.transport.is_closing():
                return
            write(chunk)
        end = b"data: [DONE]\n\n"
        write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.slotted", description=__doc__)
    parser.add_argument("--port", type=int, default=9100)
    parser.add_argument("--mean", type=float, default=0.5)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0])
    args = parser.parse_args()
    Slotted.states = [State(speed, args.mean) for speed in args.speeds]
    loop = asyncio.get_running_loop()
    for number, state in enumerate(Slotted.states):
        await loop.create_server(
            lambda state=state: Slotted(state), "127.0.0.1", args.port + number, backlog=2048
        )
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(main())
    except ImportError:
        asyncio.run(main())
