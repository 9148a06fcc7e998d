"""One request and its answer: the body, the stream, and what is read of an error."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from turbofit.load import client as client_module
from turbofit.load.client import Answer, LoadClient, StreamError, StreamReader
from turbofit.load.prompt import PromptWriter, RequestShape, png

TEXT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
THOUGHT = b'data: {"choices":[{"delta":{"reasoning_content":"x"}}]}\n\n'
STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"


def read(*pieces: bytes) -> Answer:
    answer = Answer(0.0)
    reader = StreamReader(answer)
    for at, piece in enumerate(pieces, 1):
        reader.feed(piece, float(at))
    reader.end()
    return answer


def test_text_is_timed_and_usage_counts() -> None:
    answer = read(b": ping\n\n", ROLE, TEXT, THOUGHT + TEXT, STOP, USAGE, DONE)
    assert list(answer.pieces) == [3, 4, 4]
    assert (answer.tokens, answer.prompt_tokens) == (4, 9)
    # Without any text the events are.
    assert list(read(ROLE, ROLE, STOP, USAGE, DONE).pieces) == [1, 2, 3]


def test_events_may_come_in_any_pieces() -> None:
    whole = ROLE + TEXT + STOP + DONE
    for cut in range(1, len(whole)):
        assert len(read(whole[:cut], whole[cut:]).pieces) == 1


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([b"<html>\n"], "garbage"),
        ([b"data: {\n\n"], "garbage"),
        ([b'data: {"a": 1}\n\n'], "garbage"),
        ([b"x" * (1 << 20), b"x"], "garbage"),
        ([b"data: " + b"[" * 5000 + b"\n\n"], "garbage"),
        ([b'data: {"error": {"message": "no"}}\n\n'], "error event"),
        ([TEXT], "cut short"),
        ([DONE], "empty answer"),
        ([STOP, b'data: {"choices":[],"usage":{"completion_tokens":0}}\n\n', DONE], "empty answer"),
    ],
)
def test_what_is_no_answer_has_a_name(pieces, kind) -> None:
    with pytest.raises(StreamError) as caught:
        read(*pieces)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices": 5}\n\n', b'data: {"choices": [5, null]}\n\n',
        b'data: {"choices": [{"delta": 7}]}\n\n', b'data: {"choices": [], "usage": []}\n\n',
        b'data: {"choices": [], "usage": {"completion_tokens": true}}\n\n',
    ],
)  # fmt: skip
def test_odd_events_count_for_nothing(event) -> None:
    answer = read(TEXT, event, DONE)
    assert len(answer.pieces) == 1
    assert answer.output_tokens is None


PAGE = b'{"data": [{"id": "m"}]}'


def answered(packets: list[bytes], ask: Any, status: int = 200) -> Any:
    """What the client finds in a body of packets: as aiohttp does, one read ends with one."""

    async def read(size: int) -> bytes:
        data = packets.pop(0) if packets else b""
        packets[:0] = [data[size:]] if data[size:] else []
        return data[:size]

    @asynccontextmanager
    async def send(*_: object, **__: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(status=status, headers={}, content=SimpleNamespace(read=read))

    async def go() -> Any:
        client = LoadClient("http://server", None, timeout=1.0)
        await client._session.close()
        client._session = SimpleNamespace(request=send, post=send)
        return await ask(client)

    return asyncio.run(go())


def test_a_page_that_comes_in_packets_is_read_whole() -> None:
    for at in range(1, len(PAGE), 5):
        assert answered([PAGE[:at], PAGE[at:]], lambda client: client.model()) == "m"


def test_of_an_endless_error_only_the_beginning_is_read() -> None:
    packets = [b"out of ", *[b"memory" * 4096] * 9]
    answer = answered(packets, lambda client: client.ask({}), status=500)
    assert answer.kind == "status 500"
    assert answer.example == ("out of " + "memory" * 40)[:200]
    read = 7 + 9 * 6 * 4096 - sum(map(len, packets))
    assert read == client_module._LARGEST_ERROR


def test_an_image_is_what_its_header_says_and_small() -> None:
    data = png(1000, 700, 0x123456)
    image = Image.open(BytesIO(data)).convert("RGB")
    assert image.size == (1000, 700)
    assert image.getpixel((999, 699)) == (0x12, 0x34, 0x56)
    assert len(data) < 2000


def test_bodies_have_their_sizes_and_share_only_what_they_should() -> None:
    writer = PromptWriter("m", 0, stop_early=False)
    shape = RequestShape(50, 7, ((64, 32), (16, 16)), shared=20)
    first, second = writer.body(shape), writer.body(shape)
    assert (first["max_tokens"], first["ignore_eos"]) == (7, True)
    assert first["stream_options"] == {"include_usage": True}
    one, other = first["messages"][0]["content"], second["messages"][0]["content"]
    assert [part["type"] for part in one] == ["image_url", "image_url", "text"]
    assert one[0] != other[0]
    words, others = one[2]["text"].split(), other[2]["text"].split()
    assert len(words) == len(others) == 50
    assert words[:20] == others[:20]
    assert words != others
    data = b64decode(one[0]["image_url"]["url"].partition(",")[2])
    assert Image.open(BytesIO(data)).size == (64, 32)
    body = PromptWriter("m", 0, stop_early=True).body(RequestShape(5, 7, ()))
    assert "ignore_eos" not in body
    assert isinstance(body["messages"][0]["content"], str)
