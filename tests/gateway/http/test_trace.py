from __future__ import annotations

import asyncio
import json

from tests.support.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    ask,
    chat,
    gateway,
    image_part,
    stream,
)
from turbofit.gateway.http.accesslog import answer_tokens
from turbofit.load.trace import read_trace

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":41}}\n\n'


def test_a_trace_holds_sizes_and_no_contents(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    whole = json.dumps({"choices": [], "usage": {"completion_tokens": 17}}).encode()
    answers = iter(
        [
            stream(EVENT, EVENT, DONE),
            stream(EVENT, USAGE, DONE),
            Answer(whole),
            Answer(b"", status=500),
        ]
    )
    recorder = Recorder(lambda *_: next(answers))
    app, _ = gateway(recorder=recorder, record_trace=str(path))
    secret = "the secret question"
    for _ in range(2):
        ask(app, body=chat(image_part(64, 48), stream=True, user=secret))
    ask(app, body={"model": "m", "messages": [{"role": "user", "content": secret}]})
    ask(app, body=chat())
    asyncio.run(app.shutdown())
    text = path.read_text()
    assert "secret" not in text
    assert "base64" not in text
    first, second, third = read_trace(str(path))
    assert [one.output_tokens for one in (first, second, third)] == [2, 41, 17]
    assert first.images == ((64, 48),)
    assert first.prompt_bytes == len("What is this?")
    assert third.prompt_bytes == len(secret)
    assert third.images == ()


def test_tokens_are_the_last_usage_or_the_events() -> None:
    assert answer_tokens(b'{"usage": {"completion_tokens": 5}}', 3) == 5
    assert answer_tokens(b'{"output_tokens":1} {"output_tokens": 8}', 0) == 8
    assert answer_tokens(b"", 3) == 3
