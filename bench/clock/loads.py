"""Loads on a server with a clock, whose times are divided by how much slower than life it is."""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from base64 import b64encode
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from PIL import Image

from turbofit.measure.load.result import Spread, spread
from turbofit.rehearsal.pretend.clock import HELD_UP

#: Seconds, as the card counts them, after which a picture is sent beside a stream.
_AFTER = 0.3


class Line(NamedTuple):
    """A figure of the clock beside others: its table's, the formula's, or one that was measured."""

    group: str
    what: str
    table: float | None = None
    formula: float | None = None
    measured: float | None = None
    clock: float | None = None
    held_up: float = 0.0
    load: float = 0.0

    @property
    def figure(self) -> float | None:
        """The clock's, unless the host held the cards up."""
        return None if self.held_up > HELD_UP else self.clock

    @property
    def ratio(self) -> str:
        """The clock's figure beside the table's or the measured one."""
        beside = self.table or self.measured or self.formula
        return "" if self.figure is None or not beside else f"{self.figure / beside - 1:+.1%}"


class Sent(NamedTuple):
    """What a load measured, in seconds of the card.

    ``step`` is the median time between two pieces of an answer; ``gaps`` are those that pictures
    made; ``answered`` is the requests a second that ended while the second half of them was sent.
    """

    firsts: list[float]
    tokens: list[float]
    seconds: float
    output: int
    held_up: float
    step: float = 0.0
    gaps: tuple[float, ...] = ()
    answered: float = 0.0

    @property
    def first(self) -> Spread:
        return spread(self.firsts)

    @property
    def token(self) -> Spread:
        return spread(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        return self.output / self.seconds


def question(picture: str) -> list[Any]:
    """Return the messages of a request that asks about a picture, a data URL."""
    image = {"type": "image_url", "image_url": {"url": picture}}
    content = [image, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


class Client:
    """Sends requests to one server; a context manager."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Client:
        wait = aiohttp.ClientTimeout(total=1800)
        self.session = aiohttp.ClientSession(timeout=wait, connector=aiohttp.TCPConnector(limit=0))
        self.model = (await self.get("/v1/models"))["data"][0]["id"]
        self._before = (await self.get("/about"))["clock"]
        self.factor, self._began = self._before["factor"], time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def get(self, path: str) -> Any:
        async with self.session.get(self._url + path) as response:
            return await response.json()

    async def held_up(self) -> float:
        """The share of the time since the beginning by which the host held the card up."""
        after, passed = (await self.get("/about"))["clock"], time.perf_counter() - self._began
        return max(after[name] - self._before[name] for name in ("late", "idle")) / passed

    async def ask(self, prompt: int, output: int, picture: str = "") -> list[float]:
        """Send a request; return when it was sent, and when pieces of its answer came."""
        path, body = "/generate", {"input_ids": [100] * prompt, "max_tokens": output}
        if picture:
            path = "/v1/chat/completions"
            body = {"messages": question(picture), "max_tokens": output}
        data = json.dumps({"model": self.model, "ignore_eos": True, "stream": True, **body})
        times = [time.perf_counter()]
        async with self.session.post(
            self._url + path, data=data, headers={"Content-Type": "application/json"}
        ) as response:
            response.raise_for_status()
            async for line in response.content:
                times += [time.perf_counter()] * line.startswith(b"data: {")
        return times[:1] + times[1 + bool(picture) :]  # a chat begins with a role


async def _sent(client: Client, answers: Sequence[tuple[list[float], int]]) -> Sent:
    by = client.factor
    pauses = [b - a for times, _ in answers for a, b in pairwise(times[1:])]
    begun, ended = min(times[0] for times, _ in answers), max(times[-1] for times, _ in answers)
    return Sent(
        firsts=[(times[1] - times[0]) / by for times, _ in answers],
        tokens=[(times[-1] - times[1]) / by / (n - 1) for times, n in answers if n > 1],
        seconds=(ended - begun) / by,
        output=sum(n for _, n in answers),
        held_up=await client.held_up(),
        step=median(pauses) / by if pauses else 0.0,
    )


async def closed(
    url: str,
    at_once: int,
    count: int,
    *,
    prompt: int = 0,
    output: int,
    pictures: Sequence[str] = (),
) -> Sent:
    """Send ``count`` equal requests, ``at_once`` at any time."""
    async with Client(url) as client:
        await client.ask(8, 2)  # the first request of a server loads what the others use
        left, answers = iter(range(count)), dict[int, tuple[list[float], int]]()

        async def place() -> None:
            for number in left:
                picture = pictures[number] if pictures else ""
                answers[number] = (await client.ask(prompt, output, picture), output)

        await asyncio.gather(*(place() for _ in range(at_once)))
        return await _sent(client, [answers[number] for number in range(count)])


async def poisson(url: str, rate: float, pairs: Sequence[Sequence[int]]) -> Sent:
    """Send requests of these lengths; ``rate`` requests arrive in a second of the card."""
    async with Client(url) as client:
        draw, asked = random.Random(5), []

        async def one(prompt: int, output: int) -> tuple[list[float], int]:
            return await client.ask(prompt, output), output

        for prompt, output in pairs:
            asked.append(asyncio.ensure_future(one(prompt, output)))
            await asyncio.sleep(draw.expovariate(rate) * client.factor)
        answers = await asyncio.gather(*asked)
        half, last = answers[len(asked) // 2][0][0], answers[-1][0][0]
        ended = sum(half < times[-1] <= last for times, _ in answers)
        answered = ended / (last - half) * client.factor
        return (await _sent(client, answers))._replace(answered=answered)


async def stream_beside(url: str, pictures: Sequence[str]) -> Sent:
    """Send each picture while another client's answer streams; measure the gap in that stream."""
    async with Client(url) as client:
        answers, gaps = [], []
        for picture in pictures:
            stream = asyncio.ensure_future(client.ask(16, 200))
            await asyncio.sleep(_AFTER * client.factor)
            answers.append((await client.ask(0, 2, picture), 2))
            times = await stream
            pauses = (b - a for a, b in pairwise(times[1:]))
            gaps.append(max(pauses) / client.factor)
        return (await _sent(client, answers))._replace(gaps=tuple(gaps))


def photograph(width: int, height: int) -> str:
    """A JPEG with as much detail as a photograph, as an address of a chat; no two are alike."""
    noise = np.random.default_rng().integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(held, "JPEG")
    return "data:image/jpeg;base64," + b64encode(held.getvalue()).decode()
