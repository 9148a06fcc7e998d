"""The record of each request."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

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
from tests.support.waiting import HANG
from turbofit.core.errors import UsageError
from turbofit.gateway.http.accesslog import AccessLog, access_log, answer_tokens
from turbofit.load.trace import read_trace


def test_it_begins_anew(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log", cap=200)
    for number in range(50):
        log({"number": number})
        log.settle(HANG)
    kept = (tmp_path / "access.log").read_text() + (tmp_path / "access.log.1").read_text()
    assert '"number": 49' in kept
    assert len(kept) <= 400


def test_a_folder_that_is_gone_for_a_while_costs_only_its_lines(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    log = AccessLog(folder / "access.log", cap=20)
    log({"number": 1})
    log.settle(HANG)
    (folder / "access.log").unlink()
    folder.rmdir()
    log({"number": 2})
    log.settle(HANG)
    folder.mkdir()
    log({"number": 3})
    log.close()
    missing, kept = map(json.loads, (folder / "access.log").read_text().splitlines())
    assert missing["dropped_lines"] == 1
    assert kept == {"number": 3}


def test_after_its_end_it_keeps_nothing_and_fails_nobody(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    log({"b": "é"})
    log.close()
    log({"after": "the end"})
    assert json.loads((tmp_path / "access.log").read_text()) == {"b": "é"}


def test_where_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert access_log("none") is None
    to_stderr = access_log("-")
    assert to_stderr is not None
    to_stderr({"a": 1})
    assert json.loads(capsys.readouterr().err) == {"a": 1}
    kept = access_log(str(tmp_path / "log"))
    assert isinstance(kept, AccessLog)
    kept({"a": 1})
    kept({"a": 2})
    kept.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UsageError, match="cannot be written"):
        access_log(str(tmp_path / "no" / "log"))


def test_it_ends_with_its_gateway(tmp_path: Path) -> None:
    """A restart after an engine's death begins a gateway, and with it a log of its own."""
    log = AccessLog(tmp_path / "access.log")
    app, _ = gateway(log=log)
    asyncio.run(app.shutdown())
    log({"after": "the end"})
    assert (tmp_path / "access.log").read_text() == ""


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
    assert [line.output_tokens for line in (first, second, third)] == [2, 41, 17]
    assert first.images == ((64, 48),)
    assert first.prompt_bytes == len("What is this?")
    assert third.prompt_bytes == len(secret)
    assert third.images == ()


def test_tokens_are_the_last_usage_or_the_events() -> None:
    assert answer_tokens(b'{"usage": {"completion_tokens": 5}}', 3) == 5
    assert answer_tokens(b'{"output_tokens":1} {"output_tokens": 8}', 0) == 8
    assert answer_tokens(b"", 3) == 3
