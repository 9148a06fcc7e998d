"""``turbofit chat`` against a small server."""

from __future__ import annotations

import builtins
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.cli.screen import Terminal
from tests.measure.load.scripted import ThreadedServer
from turbofit.cli.commands.chat import question_of
from turbofit.cli.main import main
from turbofit.core.errors import UsageError

PNG = b"\x89PNG picture"


class Model(ThreadedServer):
    """Answers each question with these events; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: dict[str, str] = {}
        self.longest = 99
        self.status, self.events = 200, [piece("Two "), piece("cats."), "[DONE]"]

    async def chat(self, incoming: web.Request) -> web.Response:
        key = incoming.headers.get("Authorization")
        self.bodies.append({**await incoming.json(), "key": key})
        if self.status != 200:
            refusal = {"error": {"message": "too many images"}}
            return web.json_response(refusal, status=self.status)
        if len(self.bodies[-1]["messages"]) > self.longest:
            refusal = {"error": {"message": "longer than the context of 32 tokens"}}
            return web.json_response(refusal, status=400)
        text = "".join(f"data: {event}\n\n" for event in self.events)
        return web.Response(text=text, headers=self.headers)


def piece(text: str, field: str = "content") -> str:
    return json.dumps({"choices": [{"delta": {field: text}}]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """It is asked what is piped in: a question mark."""
    monkeypatch.setattr("sys.stdin", io.StringIO("?"))
    with Model() as server:
        yield server


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a person types, line by line, then Ctrl-D."""

    def lines(*words: str) -> None:
        left = [*words]

        def line(_: str) -> str:
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr(builtins, "input", line)

    return lines


def test_what_is_piped_in_is_one_question(server, capsys) -> None:
    assert main(["chat", f"{server.url}/v1", "--api-key", "k", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == "Two cats.\n"
    (asked,) = server.bodies
    assert asked["messages"] == [{"role": "user", "content": "?"}]
    assert (asked["model"], asked["max_tokens"], asked["stream"]) == ("m", 5, True)
    assert asked["key"] == "Bearer k"


def test_it_remembers_and_forgets(server, typed, capsys) -> None:
    typed("one", "two", "/clear", "/help", "/?", "help", "?", "/bye", "never")
    assert main(["chat", server.url, "--system", "Be short."]) == 0
    said = [[one["content"] for one in body["messages"]] for body in server.bodies]
    assert said == [
        ["Be short.", "one"], ["Be short.", "one", "Two cats.", "two"], ["Be short.", "help"],
        ["Be short.", "help", "Two cats.", "?"],
    ]  # fmt: skip
    said_here = capsys.readouterr().err
    assert ("m at http" in said_here, said_here.count("'/clear'")) == (True, 3)


def test_a_refused_question_is_said_and_forgotten(server, typed, capsys) -> None:
    server.status = 400
    typed("one", "two")
    assert main(["chat", server.url]) == 0
    assert [len(body["messages"]) for body in server.bodies] == [1, 1]
    assert capsys.readouterr().err.count("answers 400: too many images\nhint: ") == 2


def test_a_conversation_that_outgrew_the_context_goes_on_without_its_older_half(
    server, typed, capsys
) -> None:
    server.longest = 5
    typed("one", "two", "three", "four")
    assert main(["chat", server.url, "--system", "Be short."]) == 0
    sent = [[one["content"] for one in body["messages"]] for body in server.bodies]
    assert [len(messages) for messages in sent] == [2, 4, 6, 4, 6, 4]
    assert sent[3] == ["Be short.", "two", "Two cats.", "three"]
    assert capsys.readouterr().err.count("the context is full") == 2
    server.longest = 1
    typed("one")
    main(["chat", server.url, "--system", "Be short."])
    assert "answers 400: longer than the context" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("events", "code", "told"),
    [
        ([piece("Two")], 3, "error: the answer breaks off"),
        (["{broken"], 3, "error: the answer breaks off: "),
        ([json.dumps({"error": {"message": "engine died"}})], 3, "breaks off: engine died"),
        # `transformers serve` says why it ends and not [DONE], seen with Transformers 5.17.
        (
            [piece("Two"), json.dumps({"choices": [{"delta": {}, "finish_reason": "length"}]})],
            0,
            "Two\n",
        ),
    ],
)
def test_an_answer_has_an_end(events, code, told, server, capsys) -> None:
    server.events = events
    assert main(["chat", server.url]) == code
    assert told in "".join(capsys.readouterr())


def test_reasoning_is_shown_apart_and_not_sent_again(server, typed, capsys) -> None:
    server.events = [piece("Hm.", "reasoning_content"), *server.events]
    typed("one", "two")
    assert main(["chat", server.url]) == 0
    assert capsys.readouterr().out.startswith("Hm.\n\nTwo cats.\n")
    assert server.bodies[1]["messages"][1]["content"] == "Two cats."


@pytest.mark.parametrize("text", ["What is {} ?", "'{}' shows what?", "{}"])
def test_a_path_becomes_the_picture(text: str, tmp_path: Path) -> None:
    file = tmp_path / ("my cat.JPG" if "'" in text else "cat.JPG")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        question_of(text.format(file))
    file.write_bytes(PNG)
    picture, said = question_of(text.format(file))["content"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,iVBOR")
    assert str(file) not in said["text"]
    dropped = tmp_path / "my cat (1).jpg"
    dropped.write_bytes(PNG)
    escaped = re.sub(r"([ ()])", r"\\\1", str(dropped))
    assert question_of(f"what is {escaped} ?")["content"][1]["text"] == "what is ?"
    assert question_of("https://x.org/a.png")["content"] == "https://x.org/a.png"
