"""``turbofit chat [URL]``: questions to a server from the terminal, pictures by their paths."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from turbofit.cli.command import Option, command
from turbofit.cli.options.common_options import SERVER_OPTIONS, server_of
from turbofit.cli.terminal.output import answer, note
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.messages import PRETEND_HEADER, PRETEND_WORDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from http.client import HTTPResponse

    from turbofit.core.json_types import JsonObject

_WORDS: Final = "'/clear' forgets what was said, '/bye' or Ctrl-D ends, Ctrl-C ends an answer"
#: A word of a message; in quotes where a path has spaces.
_WORD: Final = re.compile(r"\"[^\"]+\"|'[^']+'|\S+")
_PICTURE: Final = re.compile(r".+\.(png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE)
#: Seconds without a byte: a request may wait for a place, and then for its first token.
_SILENCE: Final = 600.0
_LONGEST_ERROR: Final = 1 << 16


class Piece(NamedTuple):
    """A piece of an answer; ``thought``: it belongs to the reasoning before the answer."""

    text: str
    thought: bool = False


class Server:
    """One model of an OpenAI-compatible server, asked without a proxy; by default its first."""

    def __init__(self, url: str, key: str | None, model: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        #: Whether an answer said that its GPUs are pretend ones.
        self.pretend = False
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self.model = model or self._first()

    def _first(self) -> str:
        with self._open("/v1/models", None) as response:
            try:
                return str(json.load(response)["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise UnservedError(
                    f"{self.url} lists no models", hint="name its model with --model"
                ) from None

    def ask(self, messages: list[JsonObject], most: int | None) -> Iterator[Piece]:
        """The pieces of the answer as they come; Ctrl-C ends the answer at the server, too."""
        body = {"model": self.model, "messages": messages, "stream": True}
        if most is not None:
            body["max_tokens"] = most
        ended = False
        with self._open("/v1/chat/completions", body) as response:
            try:
                for line in response:
                    text = line.partition(b"data:")[2].strip()
                    if text == b"[DONE]":
                        return
                    if text:
                        event = json.loads(text)
                        yield from _pieces(event)
                        # Not every server says [DONE]: `transformers serve` does not.
                        choices = event.get("choices") or []
                        ended |= any(choice.get("finish_reason") for choice in choices)
            except (OSError, ValueError) as exc:
                raise UnservedError(f"the answer breaks off: {exc}", hint="ask again") from None
        if not ended:
            raise UnservedError("the answer breaks off", hint="ask again")

    def _open(self, path: str, body: JsonObject | None) -> HTTPResponse:
        from http.client import HTTPException
        from urllib.error import HTTPError
        from urllib.request import ProxyHandler, Request, build_opener

        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, headers=self._headers)
        try:
            response: HTTPResponse = build_opener(ProxyHandler({})).open(request, timeout=_SILENCE)
        except HTTPError as exc:
            hints = {401: "give its key with --api-key", 503: "ask again once its engine is up"}
            # Not every server lists its models.
            usual = "see what the server says" if body else "name its model with --model"
            raise UnservedError(
                f"{self.url} answers {exc.code}: {_said(exc.read(_LONGEST_ERROR))}",
                hint=hints.get(exc.code, usual),
            ) from None
        except (OSError, HTTPException) as exc:
            why = getattr(exc, "reason", exc)
            raise UnservedError(
                f"{self.url} does not answer: {why}", hint="turbofit serve MODEL starts a server"
            ) from None
        if PRETEND_HEADER in response.headers and not self.pretend:
            self.pretend = True
            note(PRETEND_WORDS)
        return response


def _pieces(event: JsonObject) -> Iterator[Piece]:
    if "error" in event:
        raise UnservedError(_said(event), hint="ask again")
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        for field in ("reasoning_content", "content"):
            if delta.get(field):
                yield Piece(str(delta[field]), thought=field != "content")


def _said(document: Any) -> str:
    """What an error says, in any server's form."""
    if isinstance(document, bytes):
        try:
            document = json.loads(document)
        except ValueError:
            document = document.decode(errors="replace")
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)


def question_of(text: str) -> JsonObject:
    """A message of the user: words that are paths of pictures become these pictures."""
    from base64 import b64encode

    from turbofit.load.prompt import user_message

    pictures = []
    for word in _WORD.findall(text):
        path = os.path.expanduser(word.strip("\"'"))
        if not _PICTURE.fullmatch(path) or not os.path.isfile(path):
            continue
        try:
            with open(path, "rb") as file:
                data = b64encode(file.read()).decode()
        except OSError as exc:
            raise UsageError(f"{path} cannot be read: {exc.strerror}", hint="ask again") from None
        kind = path.rpartition(".")[2].lower().replace("jpg", "jpeg")
        pictures.append(f"data:image/{kind};base64,{data}")
        text = text.replace(word, "", 1)
    return user_message(" ".join(text.split()) if pictures else text, pictures)


@command(
    *SERVER_OPTIONS,
    Option("--system", metavar="TEXT"),
    Option("--max-tokens", type=int, metavar="N"),
)
def chat(
    *,
    url: str | None,
    model: str | None,
    api_key: str | None,
    system: str | None,
    max_tokens: int | None,
) -> int:
    """Ask and print; what is piped in is one question."""
    server = Server(*server_of(url, api_key), model)
    first: list[JsonObject] = [{"role": "system", "content": system}] if system else []
    if not sys.stdin.isatty():
        _tell(server.ask([*first, question_of(sys.stdin.read())], max_tokens))
        return 0
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - `input` edits its line by it

    note(f"{server.model} at {server.url}; a picture's path in a message sends it; {_WORDS}")
    messages = list(first)
    while (text := _line()) is not None:
        if text == "/clear":
            messages = list(first)
        elif text:
            try:
                question = question_of(text)
                reply = _tell(server.ask([*messages, question], max_tokens))
            except (UnservedError, UsageError) as exc:
                note(f"error: {exc.message}")
                note(f"hint: {exc.hint}")
                continue
            messages += [question, {"role": "assistant", "content": reply}]
    return 0


def _line() -> str | None:
    try:
        text = input(">>> ").strip()
    except EOFError:
        answer("\n")
        return None
    return None if text in ("/bye", "/exit", "/quit") else text


def _tell(pieces: Iterator[Piece]) -> str:
    """Print pieces as they come, until the end or Ctrl-C; the answer without its reasoning."""
    from turbofit.report.painters.terminal import clean_lines

    came, thought = [], False
    try:
        for piece in pieces:
            if thought and not piece.thought:
                answer("\n\n")
            thought = piece.thought
            if not thought:
                came.append(piece.text)
            answer(clean_lines(piece.text))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    answer("\n")
    return "".join(came)
