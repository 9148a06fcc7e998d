"""Conversations about a picture each: what their turns waited for, in seconds of the card.

Half of the conversations are streamed; the other half gets its answers in one piece. All state a
length, of `ANSWER` tokens: pretend cards know no end of an answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiohttp

from bench.clock.loads import photograph
from turbofit.measure.load.result import Spread, spread
from turbofit.rehearsal.pretend.clock import held_up_share

#: Turns of a conversation, tokens of an answer, and the size of its picture.
TURNS, ANSWER, SIZE = 4, 96, (1280, 720)
#: Seconds of the card between an answer and the next turn: the least and the most.
_PAUSE = (0.5, 2.0)
#: Seconds of the card in which all conversations of a burst begin.
_BURST = 2.0
#: Seconds of the card after which a turn without an answer is sent again.
_AGAIN = 1.0
#: Requests at once that all begin alike.
_AT_ONCE = 64
_QUESTION = "What do you see there, and why do you think that it is so? Please say it at length."


class Turn(NamedTuple):
    """One answered request; times are by `time.perf_counter`, or in seconds of the card.

    ``first``: until the first text of a stream, else until the whole answer.
    """

    turn: int
    streamed: bool
    begun: float
    first: float
    ended: float
    cached: int
    prompt: int


class Told(NamedTuple):
    """What a load measured. ``first`` and ``whole`` are by turn; times are in seconds of the card.

    ``late``: the share of the time by which the host held the cards up. ``failed``: by status.
    """

    first: tuple[Spread, ...]
    whole: tuple[Spread, ...]
    cached: tuple[float, ...]
    rate: float
    late: float
    failed: dict[str, int]


class Talks:
    """Conversations with one server, of ``last`` turns.

    ``factor``: how much slower than life its cards are.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, factor: float, last: int = TURNS
    ) -> None:
        self._session, self._url, self._factor, self._last = session, url, factor, last
        self.turns: list[Turn] = []
        self.failed: dict[str, int] = {}

    async def talk(self, at: float, number: int, picture: str, model: str) -> None:
        """Begin a conversation ``at`` seconds of the card from now, and carry it to its end."""
        await asyncio.sleep(at * self._factor)
        draw = random.Random(number)
        parts = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": f"{number}: {_QUESTION}"},
        ]
        said: list[Any] = [{"role": "user", "content": parts}]
        for turn in range(1, self._last + 1):
            text = await self._ask(turn, model, said, streamed=number % 2 == 0)
            while text is None:  # a client sends a turn again that an engine's death cut off
                await asyncio.sleep(_AGAIN * self._factor)
                text = await self._ask(turn, model, said, streamed=number % 2 == 0)
            said += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"And {turn}? {_QUESTION}"},
            ]
            await asyncio.sleep(draw.uniform(*_PAUSE) * self._factor)

    async def _ask(
        self, turn: int, model: str, said: Sequence[Any], *, streamed: bool
    ) -> str | None:
        """Return the answer of a turn; None if it failed, which is counted."""
        try:
            return await self._answer(turn, model, said, streamed=streamed)
        except aiohttp.ClientError:  # the connection broke, as when an engine is killed
            self._fail("broken off")
            return None

    def _fail(self, name: str) -> None:
        self.failed[name] = self.failed.get(name, 0) + 1

    async def _answer(
        self, turn: int, model: str, said: Sequence[Any], *, streamed: bool
    ) -> str | None:
        body: dict[str, Any] = {"model": model, "messages": said, "max_tokens": ANSWER}
        body |= {"temperature": 0, "ignore_eos": True}
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        begun, first, text, usage = time.perf_counter(), 0.0, [], None
        async with self._session.post(self._url + "/v1/chat/completions", json=body) as response:
            if response.status != 200:
                self._fail(f"status {response.status}")
                return None
            if not streamed:
                answer = await response.json()
                text, usage = [answer["choices"][0]["message"]["content"]], answer["usage"]
            async for line in response.content if streamed else _nothing():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                if event.get("error"):
                    self._fail("broken off")
                    return None
                for choice in event["choices"]:
                    piece = (choice.get("delta") or {}).get("content")
                    if piece:
                        first = first or time.perf_counter()
                        text.append(piece)
        ended = time.perf_counter()
        details = (usage or {}).get("prompt_tokens_details") or {}
        self.turns.append(
            Turn(
                turn, streamed, begun, (first or ended) - begun, ended - begun,
                details.get("cached_tokens") or 0, (usage or {}).get("prompt_tokens") or 0,
            )
        )  # fmt: skip
        return "".join(text)


async def _nothing() -> Any:
    for line in tuple[bytes, ...]():
        yield line


async def drive(
    url: str, count: int, *, rate: float | None = None, seed: int = 132, turns: int = TURNS
) -> Told:
    """Hold ``count`` conversations of ``turns``; ``rate`` a second of the card; None: a burst."""
    wait = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        timeout=wait, connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def get(path: str) -> Any:
            async with session.get(url + path) as response:
                return await response.json()

        model, before = (await get("/v1/models"))["data"][0]["id"], (await get("/about"))["clock"]
        by = 1.0 if before is None else before["factor"] or 1.0
        draw, at, starts = random.Random(seed), 0.0, []
        for _ in range(count):
            starts.append(draw.uniform(0, _BURST) if rate is None else at)
            at += draw.expovariate(rate) if rate is not None else 0.0
        shown = [photograph(*SIZE) for _ in range(count)]
        talks, wall = Talks(session, url, by, turns), time.perf_counter()
        await asyncio.gather(*(
            talks.talk(when, number, picture, model)
            for number, (when, picture) in enumerate(zip(starts, shown, strict=True))
        ))  # fmt: skip
        passed = time.perf_counter() - wall
        return _told(talks, by, passed, _late(before, (await get("/about"))["clock"], passed))


def _late(before: Any, after: Any, passed: float) -> float:
    """Return the share of ``passed`` seconds by which the host held the clock of the cards up."""
    if before is None:
        return 0.0
    return held_up_share(after["late"] - before["late"], after["idle"] - before["idle"], passed)


def _told(talks: Talks, by: float, passed: float, late: float) -> Told:
    turns = [[one for one in talks.turns if one.turn == turn] for turn in range(1, TURNS + 1)]
    return Told(
        first=tuple(spread(one.first / by for one in each if one.streamed) for each in turns),
        whole=tuple(spread(one.ended / by for one in each if not one.streamed) for each in turns),
        cached=tuple(
            sum(one.cached for one in each) / max(1, sum(one.prompt for one in each))
            for each in turns
        ),
        rate=len(talks.turns) / passed * by,
        late=late,
        failed=talks.failed,
    )


async def alike(url: str, count: int) -> Told:
    """Send ``count`` requests that begin with the same question and answer, as few-shot ones do."""
    words = "And so it is said of them, that there are more of these than of those. " * 20
    shot = [
        {"role": "user", "content": words},
        {"role": "assistant", "content": "Yes."},
    ]
    wait = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        timeout=wait, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        async with session.get(url + "/v1/models") as response:
            model = (await response.json())["data"][0]["id"]

        async def clock() -> Any:
            async with session.get(url + "/about") as response:
                return (await response.json())["clock"]

        before = await clock()
        by = before["factor"] or 1.0
        talks, left = Talks(session, url, by), iter(range(count))

        async def place() -> None:
            for number in left:
                question = {"role": "user", "content": f"{number}: {_QUESTION}"}
                await talks._ask(1, model, [*shot, question], streamed=True)

        wall = time.perf_counter()
        await asyncio.gather(*(place() for _ in range(_AT_ONCE)))
        passed = time.perf_counter() - wall
        return _told(talks, by, passed, _late(before, await clock(), passed))
