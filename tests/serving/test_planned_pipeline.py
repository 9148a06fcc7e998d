"""What a pipeline's engine is asked: parameters in their ranges, requests with images in turn."""

from __future__ import annotations

import asyncio
import dataclasses
import warnings
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.gateway.limits.gate import UNSTATED, Gate, KvCache
from turbofit.gateway.limits.ranges import GENERATION
from turbofit.gateway.limits.rules import Scope

SCOPE = Scope(engine="turbomind", vocabulary=512, context=4096)


#: LMDeploy warns of its own imports.
pytestmark = [pytest.mark.lmdeploy, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def ours() -> Any:
    """The module that is tested; it imports LMDeploy, which no collection of tests waits for."""
    from turbofit.serving import planned_pipeline

    return planned_pipeline


@pytest.fixture(scope="module")
def config() -> Any:
    from lmdeploy import GenerationConfig

    return GenerationConfig


class Engine:
    """The one method of LMDeploy's engine that is wrapped, and its signature."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    async def preprocess(
        self, messages: Any, session_id: Any, gen_config: Any = None, input_ids: Any = None
    ) -> Any:
        self.given.append((messages, gen_config, input_ids))


def test_what_the_engine_does_not_survive_is_lowered_and_said(config) -> None:
    assert {field.name for field in dataclasses.fields(config)} == set(GENERATION)
    asked = config(top_k=5000, max_new_tokens=10**6, random_seed=-1)
    with pytest.warns(UserWarning, match="top_k=5000->1024"):
        held = ours().hold_config(asked, SCOPE)
    assert (held.top_k, held.max_new_tokens, held.random_seed) == (1024, 4096, 2**64 - 1)
    assert asked.top_k == 5000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours().hold_config(config(), SCOPE) == config()  # an ordinary one stays


@pytest.mark.parametrize(
    ("fields", "keywords", "word"),
    [
        ({"stop_token_ids": [512]}, {}, "ids are between 0 and 511"),
        ({"repetition_penalty": 0.0}, {}, "above 0"),
        ({}, {"input_ids": [-1]}, "ids are between 0 and 511"),
    ],
)
def test_what_cannot_be_lowered_is_the_requests_own_error(
    config, fields, keywords, word, caplog
) -> None:
    from lmdeploy.serve.core.exceptions import RequestError

    engine = Engine()
    ours().hold_engine(engine, SCOPE)
    with pytest.raises(RequestError, match=word):
        asyncio.run(engine.preprocess("x", 1, config(**fields), **keywords))
    assert engine.given == []
    (record,) = [one for one in caplog.records if one.name.startswith("turbofit")]
    assert (record.levelname, word in record.getMessage()) == ("WARNING", True)
    with pytest.warns(UserWarning, match="top_k"):  # by position too
        asyncio.run(engine.preprocess("x", 1, config(top_k=2000)))
    assert engine.given[0][1].top_k == 1024


_SIGNED = "https://x.org/a.png?X-Amz-Signature=abc"


class FailingEngine:
    """LMDeploy's own errors: each becomes an empty text, and some hide their cause."""

    async def preprocess(self, messages: Any, session_id: Any) -> Any:
        from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

        if messages == "long":
            raise RequestError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "Input length (80012)")
        text = "URL is blocked for security reasons:" if messages == "blocked" else "no answer of"
        cause = ConnectionError(f"{text} {_SIGNED}")
        code = ErrorCode.PREPROCESS_FAILED if messages == "url" else ErrorCode.INVALID_REQUEST
        raise RequestError(code, str(cause)) from cause


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("long", "(context_length_exceeded): Input length (80012)"),
        ("url", "(preprocess_failed): ConnectionError"),
        ("told", "(invalid_request): ConnectionError"),
        (
            "blocked",
            "(invalid_request): URL is blocked: its host is unknown, or has no public address",
        ),
    ],
)
def test_lmdeploys_own_errors_are_logged_by_their_names(messages, words, caplog) -> None:
    from lmdeploy.serve.core.exceptions import RequestError

    engine = FailingEngine()
    ours().hold_engine(engine, SCOPE)
    with pytest.raises(RequestError):
        asyncio.run(engine.preprocess(messages, 1))
    said = [one.getMessage() for one in caplog.records if one.name.startswith("turbofit")]
    assert said == [f"a request is refused {words}"]


class CountingEngine:
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


def gate(units: int, tokens: int = UNSTATED) -> Gate:
    return Gate(units, KvCache(tokens=tokens, longest=4096, block=64, ahead=2))


async def most_there(door: Gate, answer: int | None) -> CountingEngine:
    engine = CountingEngine()
    generate = ours().queued(engine.generate, door, 1)

    async def ask(request: Any) -> list[int]:
        return [word async for word in generate(request)]

    assert await asyncio.gather(*(ask(image(answer)) for _ in range(10))) == [[0, 1, 2]] * 10
    assert (door.counted, door.reserved) == (0, 0)
    return engine


@pytest.mark.parametrize(
    ("door", "answer", "most"),
    [
        (gate(1), None, 1),
        (gate(3), None, 3),
        (gate(2, 8192), 64, 2),  # the cache holds what they state
    ],
    ids=["one", "three", "stated"],
)
async def test_no_more_images_meet_than_planned(door: Gate, answer: int | None, most: int) -> None:
    engine = await most_there(door, answer)
    assert engine.most == most
    assert engine.most_open > most  # the next begins at the first answer, not at the last


async def test_where_engines_evict_the_next_waits_for_the_end() -> None:
    assert (await most_there(gate(2, 8192), None)).most_open == 2


async def test_text_does_not_wait_and_what_fails_gives_its_room_back() -> None:
    generate = ours().queued(CountingEngine().generate, gate(1), 1)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            [word async for word in generate(image(), fail=True)]
    first = generate(image())
    waiting = asyncio.ensure_future(anext(first))
    assert [word async for word in generate(SimpleNamespace(inputs={}))] == [0, 1, 2]
    assert await waiting == 0
    await first.aclose()
    given_up = asyncio.ensure_future(anext(generate(image())))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    assert [word async for word in generate(SimpleNamespace())] == [0, 1, 2]


async def test_who_gives_up_in_line_lets_the_next_go_on() -> None:
    generate = ours().queued(CountingEngine().generate, gate(1, 0), 1)
    first = generate(image())
    assert await anext(first) == 0
    waiting = [asyncio.ensure_future(anext(generate(image()))) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await first.aclose()
    assert await waiting[1] == 0
