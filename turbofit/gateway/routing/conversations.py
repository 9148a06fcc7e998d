"""Which engine has the beginning of a conversation in its prefix cache.

A client sends a conversation whole with each turn. An engine with a prefix cache reads only the
text that is new, if it has answered the turn before. So `Fleet.best` prefers that engine. Two
conversations are taken for one if they begin with the same messages, up to the user's first, and
have the same model and API key. No header and no cookie is read.

Where a beginning went is noted in a table, and a new one goes to the least busy engine. A hash of
the beginning needs no table, but chooses without regard to load: first turns wait behind others.

A request without an answer in it is a first turn, which no engine has read before. A wrong guess
costs the time of one prefill, never more: the engine reads what it does not have. So a later turn
also waits for its engine, but for first tokens alone, each of which comes after a prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Final

import msgspec

from turbofit.core.process.interpreter import in_thread
from turbofit.core.struct import Struct
from turbofit.gateway.http.routes import Kind

#: The characters with which prompts of one conversation begin alike. A shorter prompt is read soon.
_PROMPT: Final = 1024
#: Bytes above which a body is read in a thread.
_INLINE: Final = 64 << 10
#: A mark in blocks of the Messages API that clients move to the last message at each turn.
_MOVING_MARK: Final = b'"cache_control"'
_NOTHING: Final = msgspec.Raw(b"null")


class Conversation(Struct):
    """The conversation of a request.

    ``beginning`` is a hash of its first messages. ``goes_on``: the request has an answer in it, so
    an engine may have read its beginning.
    """

    beginning: bytes
    goes_on: bool


class _Body(msgspec.Struct):
    model: Any = None
    messages: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    prompt: Any = None


class _Message(msgspec.Struct):
    role: Any = None
    type: Any = None


async def conversation_of(kind: Kind, body: bytes, key: str) -> Conversation | None:
    """Return the conversation of a body; None if none can be told, or if it is not worth it.

    ``key`` is the id of the client's API key.
    """
    if kind == "count_tokens":  # the engine counts, and reads nothing
        return None
    if len(body) <= _INLINE:
        return _read(kind, body, key)
    return await in_thread(_read, kind, body, key)


def _read(kind: Kind, body: bytes, key: str) -> Conversation | None:
    with suppress(msgspec.MsgspecError, ValueError, RecursionError):
        fields = msgspec.json.decode(body, type=_Body)
        digest = blake2b(msgspec.json.encode([key, str(fields.model)]), digest_size=16)
        if kind in ("completions", "generate"):
            return _of_prompt(digest, fields.prompt)
        given = fields.input if kind == "responses" else fields.messages
        messages = msgspec.json.decode(given, type=list[msgspec.Raw])
        return _of_messages(digest, messages, marked=_MOVING_MARK in body)
    return None


def _of_prompt(digest: blake2b, prompt: Any) -> Conversation | None:
    """Return the conversation of a prompt, in which an answer cannot be told from a question."""
    text = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if not isinstance(text, str) or len(text) < _PROMPT:
        return None
    digest.update(text[:_PROMPT].encode("utf-8", "surrogatepass"))
    return Conversation(beginning=digest.digest(), goes_on=True)


def _of_messages(
    digest: blake2b, messages: Sequence[msgspec.Raw], *, marked: bool
) -> Conversation | None:
    """Return the conversation of messages; ``marked``: blocks may have marks that move."""
    heads = [msgspec.json.decode(message, type=_Message) for message in messages]
    of_user = [place for place, head in enumerate(heads) if head.role == "user"]
    if not of_user:
        return None
    for message in messages[: of_user[0] + 1]:
        digest.update(_unmarked(message) if marked else message)
    # A call of the Responses API has no role.
    goes_on = any(
        head.role == "assistant" or head.type == "function_call" for head in heads[of_user[0] :]
    )
    return Conversation(beginning=digest.digest(), goes_on=goes_on)


def _unmarked(message: msgspec.Raw) -> bytes:
    """Return a message without the marks for caches in its blocks."""
    content = msgspec.json.decode(message)
    blocks = content.get("content")
    for block in blocks if isinstance(blocks, list) else ():
        if isinstance(block, dict):
            block.pop("cache_control", None)
    return msgspec.json.encode(content)
