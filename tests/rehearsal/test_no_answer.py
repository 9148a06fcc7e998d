"""What a server on pretend GPUs says: a sentence, as long as its client wants it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.rehearsal.no_answer import SENTENCE, say_no_answer

STOP = 999


class Status(Enum):
    """What an output of LMDeploy's engine says of its request."""

    SUCCESS = auto()
    FINISH = auto()


class Tokens:
    """A token is a letter."""

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        assert not add_bos
        return [ord(letter) for letter in text]


class Server:
    """LMDeploy's, with an engine whose tokens are 0, three at a time."""

    session_len, tokenizer = 400, Tokens()
    made, closed = 0, False

    @asynccontextmanager
    async def safe_run(self, handle: Any, session: Any, **given: Any) -> Any:
        async def outputs() -> Any:
            for _ in range(0, given["gen_config"].max_new_tokens, 3):
                self.made += 3
                scores = [{0: -0.5, 7: -1.0}] * 3 if given["gen_config"].logprobs else None
                yield SimpleNamespace(token_ids=[0] * 3, logprobs=scores, status=Status.SUCCESS)

        try:
            yield outputs()
        finally:
            self.closed = True


async def said(most: int, **more: Any) -> tuple[Server, list[Any]]:
    """What the server says to a prompt of ten tokens."""
    config = {"max_new_tokens": most, "ignore_eos": False, "stop_token_ids": [STOP], "logprobs": 0}
    server = type("OneServer", (Server,), {})
    say_no_answer(SimpleNamespace(AsyncEngine=server))
    one = server()
    given = {"input_ids": [0] * 10, "gen_config": SimpleNamespace(**{**config, **more})}
    async with one.safe_run(None, None, **given) as outputs:
        found = [output async for output in outputs]
    assert one.closed
    return one, found


def text(outputs: list[Any]) -> str:
    tokens = [token for output in outputs for token in output.token_ids]
    return "".join(chr(token) for token in tokens if token != STOP)


async def test_an_answer_that_nobody_limited_ends_with_the_sentence() -> None:
    server, outputs = await said(390)
    assert text(outputs) == f"{SENTENCE} "
    assert outputs[-1].token_ids[-1] == STOP
    assert outputs[-1].status is Status.FINISH
    assert server.made < 60


@pytest.mark.parametrize(("most", "more"), [(120, {}), (390, {"ignore_eos": True})])
async def test_a_limited_answer_is_as_long_as_it_was(most: int, more: dict[str, Any]) -> None:
    server, outputs = await said(most, **more)
    assert server.made == sum(len(output.token_ids) for output in outputs) == most
    assert text(outputs).startswith(f"{SENTENCE} {SENTENCE}")
    assert outputs[-1].status is Status.SUCCESS


async def test_each_token_of_the_sentence_is_certain() -> None:
    _, outputs = await said(30, logprobs=2)
    for output in outputs:
        assert output.logprobs == [{token: 0.0} for token in output.token_ids]
