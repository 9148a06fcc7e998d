"""The gateway hears the first tokens of answers in one piece, and lets the next images in."""

from __future__ import annotations

import asyncio

from tests.support.gateway import (
    Answer,
    FirstTokensPage,
    Recorder,
    call,
    chat,
    gateway,
    image_part,
    plan_for,
)
from tests.support.waiting import auntil
from turbofit.core.messages import EXCHANGE
from turbofit.gateway.first_tokens import FirstTokens

#: One unit fits in a forward, and the cache holds every request.
PLAN = plan_for(units_per_forward=1)


class Story:
    """A gateway whose engine answers in one piece, when it may."""

    def __init__(self, *, page: bool = True, **fields) -> None:
        self.end, self.fields = asyncio.Event(), fields
        self.recorder = Recorder(lambda *_: Answer(self.end, b'{"choices":[]}'))
        self.page = FirstTokensPage()
        if page:
            self.recorder.tokens_page = self.page
        self.app, _ = gateway(PLAN, recorder=self.recorder)
        self.asked: list[asyncio.Future] = []

    async def __aenter__(self) -> Story:
        await self.app.startup()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end.set()
        replies = await asyncio.gather(*self.asked)
        assert [reply.status for reply in replies] == [200] * len(replies)
        await self.app.shutdown()
        gate = self.app.engines[0].gate
        assert (gate.counted, gate.reserved, self.app._first_tokens._awaited) == (0, 0, {})

    async def ask(self, sent: int) -> None:
        """Ask about a picture, and wait until the engine has so many requests."""
        body = chat(image_part(), max_tokens=8, **self.fields)
        self.asked.append(asyncio.ensure_future(call(self.app, body=body)))
        await auntil(lambda: len(self.names) == sent and self.settled, "the request")

    @property
    def settled(self) -> bool:
        return len(self.names) + self.app.admission.waiting == len(self.asked)

    @property
    def names(self) -> list[str]:
        return [headers[EXCHANGE] for *_, headers in self.recorder.seen]

    def tell(self, name: str) -> None:
        self.page.lines.put_nowait(f"{name} 700\n".encode())


async def notices(story: Story) -> list[str]:
    await auntil(lambda: story.app.engines[0].serves, "the first probe")
    return (await call(story.app, "/about")).json["notices"]


async def test_the_next_picture_goes_once_the_first_token_of_the_one_before_is_there() -> None:
    async with Story() as story:
        await auntil(lambda: story.app.engines[0].tells_first_tokens, "the page")
        assert await notices(story) == []
        await story.ask(sent=1)
        await story.ask(sent=1)
        story.tell("another gateway's")
        story.tell(story.names[0])
        await auntil(lambda: len(story.names) == 2, "the second picture")
        assert len(set(story.names)) == 2


async def test_without_the_page_the_next_picture_waits_for_the_end() -> None:
    async with Story(page=False) as story:
        await story.ask(sent=1)
        await story.ask(sent=1)
        assert not story.app.engines[0].tells_first_tokens
        assert any("in one piece" in text for text in await notices(story))
        story.end.set()
        await auntil(lambda: len(story.names) == 2, "the second picture")


async def test_a_page_that_ends_is_no_word_any_more() -> None:
    async with Story() as story:
        await auntil(lambda: story.app.engines[0].tells_first_tokens, "the page")
        story.page.lines.put_nowait(b"")
        await auntil(lambda: not story.app.engines[0].tells_first_tokens, "its end")


async def test_copies_begin_when_each_of_them_has_a_token() -> None:
    begun: list[object] = []
    tokens = FirstTokens(Recorder())
    name = tokens.expect(2, begun.append)
    forgotten = tokens.expect(1, lambda _: begun.append("none"))
    tokens.forget(forgotten)
    for told in (f"{name} 7", f"{forgotten} 7", "unknown 7", "", "no line"):
        tokens._hear(told)
    assert begun == []
    for told in (f"{name} 5", f"{name} 5"):
        tokens._hear(told)
    assert begun == [7]
