"""``turbofit chat [URL]``: sends questions, with pictures, from the terminal to a server."""

from __future__ import annotations

import json
import os
import re
import sys
from base64 import b64encode
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.cli.command import Option, command
from turbofit.cli.options.common_options import SERVER_OPTIONS, server_of
from turbofit.cli.terminal.output import answer, complain, note
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.messages import PRETEND_HEADER, PRETEND_WORDS, counted, neighbours
from turbofit.core.process.network import opened
from turbofit.gateway.http.routes import first_model
from turbofit.measure.load.prompt import LARGEST_ERROR, StreamError, event_of, user_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from http.client import HTTPResponse

    from turbofit.core.struct import JsonObject

#: A word of a message; a path with spaces is in quotes, or has backslashes, as a file that was
#: dropped on the terminal.
_WORD: Final = re.compile(r"\"[^\"]+\"|'[^']+'|(?:\\\s|\S)+")
_ESCAPED: Final = re.compile(r"\\([^\w\\])")
_PICTURE: Final = re.compile(r".+\.(png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE)
#: The most seconds without a byte: a request may wait for a place, then for its first token.
_SILENCE: Final = 600.0
#: The statuses with which servers refuse messages that are longer than the context.
_TOO_LONG: Final = (400, 413)
_WORDS: Final = (
    "a picture's path in a message sends the picture; '/clear' forgets the messages, '/bye' or"
    " Ctrl-D ends the chat, Ctrl-C an answer"
)


class OutgrownError(UnservedError):
    """Raised if the messages are longer than the server's context."""


class Piece(NamedTuple):
    """A piece of an answer; if ``thought``, a piece of the reasoning before the answer."""

    text: str
    thought: bool = False


class Server:
    """A client of one model on an OpenAI-compatible server, by default of the first model.

    ``say`` is called once, with a warning, if the server runs on pretend GPUs.

    Raises:
        UnservedError: the server does not answer, or lists no models. Each question may raise this
            error, too.
    """

    def __init__(
        self, url: str, key: str | None, model: str | None, say: Callable[[str], None]
    ) -> None:
        self._say = say
        self.url = url.rstrip("/").removesuffix("/v1")
        #: Whether the header of an answer said that the GPUs are pretend ones.
        self.pretend = False
        self._key = key
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        with self._open("/v1/models", None) as response:
            name = first_model(response.read())
        if name is None:
            raise UnservedError(f"{self.url} lists no models", hint="name its model with --model")
        return name

    def ask(self, messages: list[JsonObject], most: int | None) -> Iterator[Piece]:
        """Yield the pieces of the answer as they come; Ctrl-C also stops the server's work.

        Raises:
            UnservedError: the server refuses, or the answer breaks off.
        """
        body = {"model": self.model, "messages": messages, "stream": True}
        if most is not None:
            body["max_tokens"] = most
        ended = False
        with self._open("/v1/chat/completions", body) as response:
            try:
                for line in response:
                    event = event_of(line.strip())
                    if event == {}:  # the server has sent [DONE]
                        return
                    # Some servers, such as `transformers serve`, send no [DONE].
                    for choice in (event or {}).get("choices") or []:
                        delta = choice.get("delta") or {}
                        for field in ("reasoning_content", "content"):
                            if delta.get(field):
                                yield Piece(str(delta[field]), thought=field != "content")
                        ended |= bool(choice.get("finish_reason"))
            except (StreamError, OSError) as exc:
                said = _error_message(str(exc).encode())
                raise UnservedError(f"the answer breaks off: {said}", hint="ask again") from None
        if not ended:
            raise UnservedError("the answer breaks off", hint="ask again")

    def _open(self, path: str, body: JsonObject | None) -> HTTPResponse:
        """Send a request to the server; an answer other than 200 is an error."""
        from http.client import HTTPException

        try:
            response = opened(self.url + path, body, self._key, timeout=_SILENCE)
        except (OSError, HTTPException) as exc:
            raise UnservedError(
                f"{self.url} does not answer: {exc}",
                hint='turbofit serve MODEL starts a server, which says "ready at" when it answers',
            ) from None
        if response.status != 200:
            hints = {401: "give its key with --api-key", 503: "ask again once its engine is up"}
            # Only the list of models is asked without a body, and not every server has a list.
            usual = "see what the server says" if body else "name its model with --model"
            with response:
                said = _error_message(response.read(LARGEST_ERROR))
            outgrown = response.status in _TOO_LONG and "context" in said.lower()
            raise (OutgrownError if outgrown else UnservedError)(
                f"{self.url} answers {response.status}: {said}",
                hint=hints.get(response.status, usual),
            )
        if PRETEND_HEADER in response.headers and not self.pretend:
            self.pretend = True
            self._say(PRETEND_WORDS)
        return response


def _error_message(text: bytes) -> str:
    """Return the message of a server's error, which is JSON of any form, or text."""
    try:
        document = json.loads(text)
    except ValueError:
        return text.decode(errors="replace")
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)


def question_of(text: str) -> JsonObject:
    """Make a user's message; each word that is the path of a picture becomes the picture.

    Raises:
        UsageError: a picture cannot be read.
    """
    pictures = []
    for word in _WORD.findall(text):
        path = os.path.expanduser(_ESCAPED.sub(r"\1", word.strip("\"'")))
        if not _PICTURE.fullmatch(path) or "://" in path:
            continue
        try:
            with open(path, "rb") as file:
                data = b64encode(file.read()).decode()
        except OSError as exc:
            raise UsageError(
                f"{path} cannot be read: {exc.strerror}",
                hint="a word that ends like a picture's file, as in .png, is read as its path",
            ) from None
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
    """Send questions and print the answers; input from a pipe is one question."""
    if url is not None and " " in url:
        hint = neighbours()["arguments"]["chat"]
        raise UsageError(f"{url} is no address of a server", hint=hint)
    server = Server(*server_of(url, api_key), model, note)
    instructions: list[JsonObject] = [{"role": "system", "content": system}] if system else []
    if not sys.stdin.isatty():
        _print_answer(server.ask([*instructions, question_of(sys.stdin.read())], max_tokens))
        return 0
    with suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401 - `input` edits its line with it

    note(f"{server.model} at {server.url}; {_WORDS}")
    messages = list(instructions)
    while (text := _typed_line()) is not None:
        if text == "/clear":
            messages = list(instructions)
        elif text in ("/help", "/?"):
            note(_WORDS)
        elif text:
            try:
                question = question_of(text)
                messages, reply = _answered(server, instructions, [*messages, question], max_tokens)
            except (UnservedError, UsageError) as exc:
                complain(exc.to_dict(), as_json=False)
                continue
            messages = [*messages, {"role": "assistant", "content": reply}]
    return 0


def _answered(
    server: Server, instructions: list[JsonObject], messages: list[JsonObject], most: int | None
) -> tuple[list[JsonObject], str]:
    """Print the answer to the last message; return the messages that were sent, and the answer.

    Messages that outgrew the context are sent without the older half of them. A shorter cut would
    have to be made again at the next turn, and each cut costs the server's prefix cache.
    """
    try:
        return messages, _print_answer(server.ask(messages, most))
    except OutgrownError:
        said = messages[len(instructions) :]
        asked = [place for place, message in enumerate(said) if message["role"] == "user"]
        if len(asked) < 2:
            raise
        cut = asked[len(asked) // 2]
        note(f"left out: {counted(cut, 'old message')}, since the context is full")
    return _answered(server, instructions, [*instructions, *said[cut:]], most)


def _typed_line() -> str | None:
    """Return the next line that a person types; None at the end of the chat."""
    try:
        text = input(">>> ").strip()
    except EOFError:
        answer("\n")
        return None
    return None if text in ("/bye", "/exit", "/quit") else text


def _print_answer(pieces: Iterator[Piece]) -> str:
    """Print pieces as they come, until the end or Ctrl-C; return the answer without reasoning."""
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
    except KeyboardInterrupt:  # ends this answer; the only answer to a pipe ends the command, too
        if not sys.stdin.isatty():
            raise
    answer("\n")
    return "".join(came)
