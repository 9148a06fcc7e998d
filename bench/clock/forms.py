"""What each form of client gets where images may wait for each other, and where they may not.

A client reads a stream or waits for an answer in one piece, and states a length or none. All
answers have `ANSWER` tokens, which the engine is told (`short/sitecustomize.py`).
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.clock.loads import Client, photograph, question
from tests.support.processes import REPO

#: Tokens of an answer, and the size of each request's own picture.
ANSWER, SIZE = 96, (1280, 720)
#: Clients, and requests of all of them.
AT_ONCE, REQUESTS = 16, 32
#: The environment of servers whose answers end after `ANSWER` tokens.
SHORT = {
    "PYTHONPATH": f"{Path(__file__).with_name('short')}:{REPO}",
    "TURBOFIT_BENCH_ANSWER": str(ANSWER),
}
#: A plan whose images wait, or could, with what makes them wait, and how much slower than the
#: bench's other loads its cards are.
PLANS = (
    ("internvl3-2b", "1xrtx3090:free=7GiB", (), 2), ("internvl2-8b", "1xl4", (), 1),
    ("internvl2-8b", "1xrtx3090", ("--enable-prefix-caching",), 1),
)  # fmt: skip
NO_QUEUE = ("--no-queue-images",)


class Form(NamedTuple):
    """How a client asks."""

    streamed: bool
    stated: bool

    def __str__(self) -> str:
        how = "streamed" if self.streamed else "in one piece"
        return f"{how}, {'a stated length' if self.stated else 'no length'}"


FORMS = tuple(Form(streamed, stated) for streamed in (True, False) for stated in (True, False))


class Given(NamedTuple):
    """``rate``: requests a second of the card; ``tokens``: of an answer, in the mean.

    ``refused``: requests without an answer. ``held_up``: the share of the time by which the host
    held the card up.
    """

    rate: float
    tokens: float
    refused: int
    held_up: float


async def given(url: str, form: Form, *, at_once: int = AT_ONCE, count: int = REQUESTS) -> Given:
    """Send ``count`` requests with a picture each, ``at_once`` at any time."""
    pictures = [photograph(*SIZE) for _ in range(count)]
    async with Client(url) as client:
        left, tokens, refused = iter(pictures), list[int](), 0

        async def place() -> None:
            nonlocal refused
            for picture in left:
                told = await _ask(client, url, form, picture)
                if told is None:
                    refused += 1
                else:
                    tokens.append(told)

        begun = time.perf_counter()
        await asyncio.gather(*(place() for _ in range(at_once)))
        seconds = (time.perf_counter() - begun) / client.factor
        mean = sum(tokens) / max(1, len(tokens))
        return Given(len(tokens) / seconds, mean, refused, await client.held_up())


async def _ask(client: Client, url: str, form: Form, picture: str) -> int | None:
    """Return the tokens of an answer; None if the request was refused."""
    body: dict[str, Any] = {"model": client.model, "stream": form.streamed}
    body["messages"] = question(picture)
    if form.stated:
        body["max_tokens"] = ANSWER
    if form.streamed:
        body["stream_options"] = {"include_usage": True}
    async with client.session.post(url + "/v1/chat/completions", json=body) as response:
        text = await response.text()
        if response.status != 200:
            return None
    if not form.streamed:
        return int(json.loads(text)["usage"]["completion_tokens"])
    events = (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))
    usages = [event["usage"] for event in events if event.get("usage")]
    return int(usages[-1]["completion_tokens"])
