"""Holds the fields of a request to `parameters.RULES`, before an engine sees them."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.gateway.limits.gate import TEMPLATE_TOKENS, UNSTATED
from turbofit.gateway.limits.grammars import check_format, check_tools
from turbofit.gateway.limits.parameters import (
    ANSWER_LENGTHS,
    DIFFERENT,
    MOST_TEMPLATE_ARGUMENTS,
    RULES,
    TEMPLATE_ARGUMENTS,
)
from turbofit.gateway.limits.request_limits import shown
from turbofit.gateway.limits.rules import Scope, refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.json_types import JsonObject
    from turbofit.gateway.limits.request_limits import Bounds
    from turbofit.gateway.limits.rules import Rule

#: The most messages and parts of them. LMDeploy takes 43 us for each on its event loop, 0.4 s for
#: all of these. A chat with more is refused, even if it would fit the session.
_MOST_MESSAGES: Final = 8192
_CONVERSATIONS: Final = ("messages", "input", "system")
_TEMPLATE: Final = "chat_template_kwargs"
_ASCII: Final = bytes(range(128))
#: The most bytes that NFC makes of one byte (Unicode Standard Annex 15, expansion factors).
_NFC: Final = 3


def scope_of(bounds: Bounds) -> Scope:
    return Scope(
        engine=bounds.engine,
        vocabulary=bounds.vocabulary,
        session=bounds.longest_request_tokens,
    )


def hold_parameters(kind: str, body: JsonObject, scope: Scope) -> list[str]:
    """Hold each field to its range, in place; returns changes like ``top_k=4096->1024``.

    ``body`` has only known fields, none of which is null; ``kind`` is a `routes.Kind`.
    """
    changes = hold_fields(RULES[kind], body, scope)
    _check_conversation(body, scope.session)
    check_template(body.get(_TEMPLATE))
    return changes + check_format(body) + check_tools(body.get("tools"))


def hold_fields(rules: Mapping[str, Rule], fields: JsonObject, scope: Scope) -> list[str]:
    """Hold values to their rules, in place; returns the changes."""
    changes = []
    for name, value in fields.items():
        in_range = rules[name].hold(name, value, scope)
        of_engine = DIFFERENT.get(scope.engine, {}).get(name)
        if of_engine is not None and in_range is not None:
            in_range = of_engine.hold(name, in_range, scope)
        if in_range is not value:
            fields[name] = in_range
            if isinstance(in_range, int | float) and _differs(value, in_range):
                changes.append(f"{name}={shown(value)}->{shown(in_range)}")
    return changes


def lower_answer(kind: str, body: JsonObject, left: int, changes: list[str]) -> None:
    """Lower the answer's length to ``left`` tokens, in place, and say so once in ``changes``.

    Over by the tokens of the text, which are not counted yet: the engines themselves lower the
    length by those, silently.
    """
    for name in ANSWER_LENGTHS.get(kind, ()):
        tokens = body.get(name)
        if isinstance(tokens, int) and tokens > left > 0:
            body[name], wished = left, f"{name}={shown(tokens)}"
            for change in [it for it in changes if it.startswith(f"{name}=")]:  # by its range
                wished = change.partition("->")[0]
                changes.remove(change)
            changes.append(f"{wished}->{left}")


def _differs(value: Any, in_range: float) -> bool:
    """Whether the value is another number, and not only another spelling of it."""
    if isinstance(in_range, bool):
        return False
    try:
        return int(value) != in_range if isinstance(in_range, int) else float(value) != in_range
    except (TypeError, ValueError, OverflowError):
        return True


def _check_conversation(body: Mapping[str, Any], session: int) -> None:
    """Refuse too many messages; in every chat template each takes at least a token."""
    most = min(_MOST_MESSAGES, session or _MOST_MESSAGES)
    parts = 0
    for name in _CONVERSATIONS:
        listed = body.get(name)
        if not isinstance(listed, list):
            continue
        if len(listed) > most:
            raise refused(name, f"has {len(listed)} messages, the limit is {most}")
        for message in listed:
            if not isinstance(message, dict):
                # The Responses API tries it as sixty types of items, and reports every failure.
                raise refused(name, "holds something that is no object")
            parts += _parts(message.get("content"))
        if parts > _MOST_MESSAGES:
            raise refused(name, f"has {parts} parts of messages, the limit is {_MOST_MESSAGES}")


def _parts(content: Any) -> int:
    """The number of parts of a message, and of the tool results among them."""
    if not isinstance(content, list):
        return 0
    inner = (part.get("content") for part in content if isinstance(part, dict))
    return len(content) + sum(len(parts) for parts in inner if isinstance(parts, list))


def check_template(arguments: Any) -> None:
    """Refuse arguments of a chat template that are too many, or that the server sets itself.

    Raises:
        Refusal: it is no object, has too many names, or one that the server sets.
    """
    if arguments is None:
        return
    if not isinstance(arguments, dict):
        raise refused(_TEMPLATE, "is no object")
    if len(arguments) > MOST_TEMPLATE_ARGUMENTS:
        raise refused(
            _TEMPLATE, f"has {len(arguments)} names, the limit is {MOST_TEMPLATE_ARGUMENTS}"
        )
    for name in arguments:
        if name in TEMPLATE_ARGUMENTS:
            raise refused(_TEMPLATE, f"may not hold {name!r}: it is the server's")


def most_tokens(kind: str, body: JsonObject, raw: bytes, beside: int, images: int) -> int:
    """Tokens of the prompt and the longest answer of one copy; `UNSTATED` if no length is stated.

    A token of a text has at least one byte. Under for a tokenizer that normalises by NFKC, and for
    a template that writes tools more than twice as long as they came. ``raw`` is the JSON of
    ``body``, ``beside`` the number of its bytes that are no images, ``images`` the images' tokens.
    """
    stated = [body.get(name) for name in ANSWER_LENGTHS.get(kind, ())]
    answer = max((length for length in stated if isinstance(length, int)), default=None)
    if answer is None:
        return UNSTATED
    tools = body.get("tools")
    again = len(msgspec.json.encode(tools)) if tools else 0
    return images + beside + again + _normalised(raw) + TEMPLATE_TOKENS + answer


def _normalised(raw: bytes) -> int:
    """Bytes that a tokenizer's NFC may add to a text: 0 for nearly all texts."""
    if raw.isascii():
        return 0
    high = raw.translate(None, _ASCII)
    if unicodedata.is_normalized("NFC", high.decode("utf-8", "replace")):
        return 0
    return (_NFC - 1) * len(high)
