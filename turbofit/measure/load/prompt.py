"""Makes the bodies of requests: text of about a given number of tokens, and images.

There is no tokenizer: a prompt of N tokens has N words. Requests share only the prefix that the
load asks for, so that prefix caching finds no other prefix.
"""

from __future__ import annotations

import random
from base64 import b64encode
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.core.png import png

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.struct import JsonObject
    from turbofit.measure.load.spec import LoadSpec

#: Exceptions from decoding bytes that are not JSON.
NO_JSON: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
#: The most bytes of an error's text.
LARGEST_ERROR: Final = 1 << 16
_OTHERS: Final = (b":", b"event:", b"id:", b"retry:")
#: English words that are one token, with the space before them, in most tokenizers.
_WORDS: Final = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by",
    "on", "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an",
    "they", "which", "one", "you", "were", "all", "her", "she", "there", "would", "their", "we",
    "him", "been", "has", "when", "who", "will", "no", "more", "if", "out", "so", "said",
    "what", "up", "its", "about", "into", "than", "them", "can", "only", "other", "time", "new",
    "some", "could", "these", "two", "may", "first", "then", "do", "any",
]  # fmt: skip


class StreamError(Exception):
    """Raised if a server's answer is an error, is incomplete, or cannot be read.

    ``kind`` names the error; the message is the beginning of the answer's bytes.
    """

    def __init__(self, kind: str, example: bytes = b"") -> None:
        super().__init__(example[:LARGEST_ERROR].decode(errors="replace"))
        self.kind = kind


def event_of(line: bytes) -> JsonObject | None:
    """Return the event in a line of a stream; None without data, empty for ``[DONE]``.

    Raises:
        StreamError: the line is no event with choices, or the event reports an error.
    """
    if not line or line.startswith(_OTHERS):
        return None
    body = line[5:].strip()
    if line.startswith(b"data:") and body == b"[DONE]":
        return {}
    try:
        event = msgspec.json.decode(body) if line.startswith(b"data:") else None
    except NO_JSON:
        event = None
    if not isinstance(event, dict) or not ("choices" in event or "error" in event):
        raise StreamError("garbage", body)
    if event.get("error") is not None:
        raise StreamError("error event", body)
    return event


class PromptWriter:
    """Makes bodies of chat completions, which differ only in their words and images' colours."""

    def __init__(self, model: str, spec: LoadSpec) -> None:
        self._model, self._spec = model, spec
        self._common = _text(spec.shared_prefix)

    def body(self, said: Sequence[JsonObject] = ()) -> JsonObject:
        """Return the body of one request; a stream has its usage at its end.

        ``said`` are the messages of its conversation before. Only a first turn has images.
        """
        spec = self._spec
        turn = user_message(_text(spec.prompt_tokens), ()) if said else self._first_turn()
        body: JsonObject = {
            "model": self._model,
            "messages": [*said, turn],
            "temperature": 0,
        }
        if spec.output_tokens:
            body["max_tokens"] = spec.output_tokens
        if not spec.ends_early:
            body["ignore_eos"] = True
        if not spec.whole:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def _first_turn(self) -> JsonObject:
        spec = self._spec
        width, height = spec.image_size
        pictures = [png(width, height, random.getrandbits(24)) for _ in range(spec.images)]
        images = [f"data:image/png;base64,{b64encode(data).decode()}" for data in pictures]
        prompt = f"{self._common} {_text(spec.prompt_tokens - spec.shared_prefix)}".lstrip()
        return user_message(prompt, images)


def user_message(text: str, images: Iterable[str]) -> JsonObject:
    """Return a user's message: first its images, then its text."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def _text(words: int) -> str:
    return " ".join(random.choices(_WORDS, k=words))
