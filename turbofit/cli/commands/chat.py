"""``turbofit chat [URL]``: questions to a server from the terminal; pictures by their paths."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from turbofit.cli.command import Option, command
from turbofit.cli.options.common_options import SERVER_OPTIONS, server_of
from turbofit.cli.terminal.output import answer, note
from turbofit.core.errors import UnservedError, UsageError
from turbofit.measure.load.chat import Piece, Server, question_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.json_types import JsonObject

_WORDS: Final = "'/clear' forgets what was said, '/bye' or Ctrl-D ends, Ctrl-C ends an answer"


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
    """Send questions and print answers; piped input is one question."""
    server = Server(*server_of(url, api_key), model, note)
    first: list[JsonObject] = [{"role": "system", "content": system}] if system else []
    if not sys.stdin.isatty():
        _tell(server.ask([*first, question_of(sys.stdin.read())], max_tokens))
        return 0
    with suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401 - `input` edits its line with it

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
    """Print pieces as they come, until the end or Ctrl-C; returns the answer without reasoning."""
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
