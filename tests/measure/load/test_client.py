"""What a load reads of a streamed answer."""

from __future__ import annotations

import pytest

from turbofit.measure.load.client import Answer, StreamReader, read_whole
from turbofit.measure.load.prompt import StreamError

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


def test_odd_events_count_for_nothing() -> None:
    for event in (
        b'{"choices": 5}', b'{"choices": [5, null]}', b'{"choices": [{"delta": 7}]}',
        b'{"choices": [], "usage": []}', b'{"choices": [], "usage": {"completion_tokens": true}}',
    ):  # fmt: skip
        answer = read(TEXT, b"data: " + event + b"\n\n", DONE)
        assert (len(answer.pieces), answer.output_tokens) == (1, None), event


WHOLE = (
    b'{"choices":[{"message":{"content":"x y"}}],"usage":{"prompt_tokens":9,"completion_tokens":4}}'
)


def test_an_answer_in_one_piece_has_its_usage_and_no_first_token() -> None:
    answer = Answer(0.0, whole=True)
    read_whole(WHOLE, answer)
    assert (answer.tokens, answer.prompt_tokens, answer.ttft, answer.tpot) == (4, 9, None, None)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html>", "garbage"),
        (b'{"choices":[]}', "garbage"),
        (b'{"choices":[{"message":{"content":""}}]}', "empty answer"),
        (WHOLE.replace(b":4}", b":0}"), "empty answer"),
    ],
)
def test_what_is_no_answer_in_one_piece_is_named(body: bytes, kind: str) -> None:
    with pytest.raises(StreamError) as caught:
        read_whole(body, Answer(0.0, whole=True))
    assert caught.value.kind == kind
