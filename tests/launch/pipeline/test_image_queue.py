from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.waiting import HANG
from turbofit.gateway.limits.gate import UNSTATED, Gate, KvCache
from turbofit.launch.pipeline.held import queued


class Engine:
    """Counts what waits for its first answer; knows nothing of the queue."""

    def __init__(self) -> None:
        self.before = self.most = self.open = self.most_open = 0

    async def generate(self, request: Any, fail: bool = False) -> AsyncIterator[int]:
        self.before += 1
        self.open += 1
        self.most, self.most_open = max(self.most, self.before), max(self.most_open, self.open)
        await asyncio.sleep(0)
        self.before -= 1
        try:
            if fail:
                raise RuntimeError
            for word in range(3):
                yield word
                await asyncio.sleep(0)
        finally:
            self.open -= 1


def image(answer: int | None = None, prompt: int = 64) -> Any:
    config = SimpleNamespace(max_new_tokens=answer)
    return SimpleNamespace(inputs={"multimodal": [1]}, input_token_len=prompt, gen_config=config)


def text() -> Any:
    return SimpleNamespace(inputs={})


def gate(units: int, tokens: int = UNSTATED) -> Gate:
    return Gate(units, KvCache(tokens=tokens, longest=4096, block=64))


async def most_there(door: Gate, answer: int | None) -> Engine:
    engine = Engine()
    generate = queued(engine.generate, door, 1)

    async def ask(request: Any) -> list[int]:
        return [word async for word in generate(request)]

    answers = await asyncio.gather(*(ask(image(answer)) for _ in range(10)))
    assert answers == [[0, 1, 2]] * 10
    assert (door.counted, door.reserved) == (0, 0)
    return engine


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_images_meet_than_planned(most: int) -> None:
    engine = asyncio.run(most_there(gate(most), None))
    assert engine.most == most
    assert engine.most_open > most  # the next begins at the first answer, not at the last


def test_where_engines_evict_the_next_waits_for_the_end() -> None:
    assert asyncio.run(most_there(gate(2, 8192), None)).most_open == 2


def test_where_the_cache_holds_what_they_state_it_does_not_wait() -> None:
    engine = asyncio.run(most_there(gate(2, 8192), 64))
    assert engine.most == 2
    assert engine.most_open > 2


def test_text_does_not_wait_and_what_fails_gives_its_room_back() -> None:
    async def run() -> None:
        engine = Engine()
        generate = queued(engine.generate, gate(1), 1)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                [word async for word in generate(image(), fail=True)]
        first = generate(image())
        waiting = asyncio.ensure_future(anext(first))
        assert [word async for word in generate(text())] == [0, 1, 2]
        assert await waiting == 0
        await first.aclose()
        given_up = asyncio.ensure_future(anext(generate(image())))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        assert [word async for word in generate(SimpleNamespace())] == [0, 1, 2]

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_who_gives_up_in_line_lets_the_next_go_on() -> None:
    async def run() -> None:
        engine = Engine()
        generate = queued(engine.generate, gate(1, 0), 1)
        first = generate(image())
        assert await anext(first) == 0
        waiting = [asyncio.ensure_future(anext(generate(image()))) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await first.aclose()
        assert await waiting[1] == 0

    asyncio.run(asyncio.wait_for(run(), HANG))
