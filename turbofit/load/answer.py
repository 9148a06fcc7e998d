"""One answer of a server as it streams in: when each piece came, and what went wrong."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

#: No server of text sends a longer line in a stream.
_LONGEST_LINE: Final = 1 << 20
_TEXTS: Final = ("content", "reasoning_content", "reasoning")
_LONGEST_EXAMPLE: Final = 1 << 16
_SHOWN: Final = 200


class StreamError(Exception):
    """What a server sent is no answer.

    Args:
        kind: its name among errors.
        example: what was sent.
    """

    def __init__(self, kind: str, example: bytes = b"") -> None:
        super().__init__(kind)
        self.kind, self.example = kind, example[:_LONGEST_EXAMPLE].decode(errors="replace")


@dataclass(slots=True)
class Answer:
    """The answer to one request; times by the load's clock.

    ``counts``: whether it began in the window. ``kind``: why it is no answer; empty where it is
    one. ``pieces``: when each piece of text came.
    """

    begun: float
    counts: bool = False
    ended: float | None = None
    kind: str = ""
    example: str = ""
    pieces: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    retry_after: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether it came to a good end."""
        return self.ended is not None and not self.kind

    @property
    def tokens(self) -> int:
        """Tokens of the answer, as the server counts them; else its pieces.

        Under where pieces are counted: one may hold several tokens.
        """
        return len(self.pieces) if self.output_tokens is None else self.output_tokens

    def failed(self, at: float, kind: str, example: str = "") -> Answer:
        """It ended badly."""
        self.ended, self.kind, self.example = at, kind, " ".join(example.split())[:_SHOWN]
        return self


class StreamReader:
    """Reads the events of a chat completion.

    Args:
        answer: takes what is read.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer, self._rest = answer, b""
        #: When events came, with text or without: what a server without any text is timed by.
        self._events: array[float] = array("d")
        self._done = self._finished = False

    def feed(self, data: bytes, at: float) -> None:
        """Bytes of the body that came at this time.

        Raises:
            StreamError: they are no events of a completion, or one that says that it failed.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            raise StreamError("garbage", self._rest)
        for line in lines:
            self._line(line.strip(), at)

    def end(self) -> None:
        """The stream is over.

        Raises:
            StreamError: it was cut short, or had nothing in it.
        """
        if not self._events:
            raise StreamError("empty answer")
        if not (self._done or self._finished):
            raise StreamError("cut short")
        if not self._answer.pieces:
            self._answer.pieces = self._events
        if self._answer.output_tokens == 0:
            raise StreamError("empty answer")

    def _line(self, line: bytes, at: float) -> None:
        if not line or line.startswith((b":", b"event:", b"id:", b"retry:")):
            return
        if not line.startswith(b"data:"):
            raise StreamError("garbage", line)
        body = line[5:].strip()
        if body == b"[DONE]":
            self._done = True
            return
        try:
            event = msgspec.json.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise StreamError("garbage", body) from None
        if not isinstance(event, dict) or not ("choices" in event or "error" in event):
            raise StreamError("garbage", body)
        if event.get("error") is not None:
            raise StreamError("error event", body)
        self._event(event, at)

    def _event(self, event: dict[str, Any], at: float) -> None:
        choices = event["choices"] if isinstance(event["choices"], list) else []
        choices = [choice for choice in choices if isinstance(choice, dict)]
        if choices:
            self._events.append(at)
        if any(_has_text(choice.get("delta")) for choice in choices):
            self._answer.pieces.append(at)
        if any(choice.get("finish_reason") for choice in choices):
            self._finished = True
        usage = event.get("usage")
        if isinstance(usage, dict):
            self._answer.prompt_tokens = _count(usage.get("prompt_tokens"))
            self._answer.output_tokens = _count(usage.get("completion_tokens"))


def _has_text(delta: Any) -> bool:
    if not isinstance(delta, dict):
        return False
    texts = (delta.get(name) for name in _TEXTS)
    return any(isinstance(text, str) and text for text in texts) or bool(delta.get("tool_calls"))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
