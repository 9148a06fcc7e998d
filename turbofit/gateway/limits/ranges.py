"""Holds the fields of a request to `parameters.RULES`, before anything of an engine sees them."""

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

#: Messages and their parts. LMDeploy takes 43 us each on its event loop, so that these take 0.4 s.
#: Over: a chat of more of them is refused, whether or not it would fit the session.
_MOST_MESSAGES: Final = 8192
_CONVERSATIONS: Final = ("messages", "input", "system")
_TEMPLATE: Final = "chat_template_kwargs"
_ASCII: Final = bytes(range(128))
#: Bytes that NFC makes of one byte at most (Unicode Standard Annex 15, table of expansion factors).
_NFC: Final = 3


def scope_of(bounds: Bounds) -> Scope:
    return Scope(
        engine=bounds.engine,
        vocabulary=bounds.vocabulary,
        session=bounds.longest_request_tokens,
    )


def hold_parameters(kind: str, body: JsonObject, scope: Scope) -> list[str]:
    """Hold each field to its range, in place; what was changed, as ``top_k=4096->1024``.

    ``body`` has known fields only, none of them null; ``kind`` is a `routes.Kind`.
    """
    changes = hold_fields(RULES[kind], body, scope)
    _check_conversation(body, scope.session)
    check_template(body.get(_TEMPLATE))
    return changes + check_format(body) + check_tools(body.get("tools"))


def hold_fields(rules: Mapping[str, Rule], fields: JsonObject, scope: Scope) -> list[str]:
    """Hold values to their rules, in place; what was changed."""
    changes = []
    for name, value in fields.items():
        in_range = _in_range(name, value, rules[name], scope)
        if in_range is not value:
            fields[name] = in_range
            if isinstance(in_range, int | float) and _differs(value, in_range):
                changes.append(f"{name}={shown(value)}->{shown(in_range)}")
    return changes


def lower_answer(kind: str, body: JsonObject, left: int) -> list[str]:
    """Lower the answer's length to the tokens that are ``left``, in place; what was changed.

    Over by the tokens of the text, which nobody has counted yet: the engines lower it by those
    themselves, without a word.
    """
    changes = []
    for name in ANSWER_LENGTHS.get(kind, ()):
        tokens = body.get(name)
        if isinstance(tokens, int) and tokens > left > 0:
            body[name] = left
            changes.append(f"{name}={shown(tokens)}->{left}")
    return changes


def _in_range(name: str, value: Any, rule: Rule, scope: Scope) -> Any:
    in_range = rule.hold(name, value, scope)
    of_engine = DIFFERENT.get(scope.engine, {}).get(name)
    if of_engine is not None and in_range is not None:
        in_range = of_engine.hold(name, in_range, scope)
    return in_range


def _differs(value: Any, in_range: float) -> bool:
    """Whether it is not the same number, spelled otherwise."""
    if isinstance(in_range, bool):
        return False
    try:
        return int(value) != in_range if isinstance(in_range, int) else float(value) != in_range
    except (TypeError, ValueError, OverflowError):
        return True


def _check_conversation(body: Mapping[str, Any], session: int) -> None:
    """Refuse too many messages; each is a token at least in every chat template."""
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
                # The Responses API tries it as sixty types of items, and says of each why not.
                raise refused(name, "holds something that is no object")
            parts += _parts(message.get("content"))
        if parts > _MOST_MESSAGES:
            raise refused(name, f"has {parts} parts of messages, the limit is {_MOST_MESSAGES}")


def _parts(content: Any) -> int:
    """Parts of a message, and of the tool results among them."""
    if not isinstance(content, list):
        return 0
    inner = (part.get("content") for part in content if isinstance(part, dict))
    return len(content) + sum(len(parts) for parts in inner if isinstance(parts, list))


def check_template(arguments: Any) -> None:
    """Refuse arguments of a chat template that are too many, or the server's own.

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
    """Tokens of the prompt and of the longest answer of one copy; `UNSTATED`: no length is stated.

    A token of a text has one byte at least. Under for a tokenizer that normalises by NFKC, and for
    a template that writes tools more than twice as long as they came. ``raw`` is the JSON of
    ``body``, ``beside`` the bytes of it that are no images, ``images`` the images' tokens.
    """
    stated = [body.get(name) for name in ANSWER_LENGTHS.get(kind, ())]
    answer = max((length for length in stated if isinstance(length, int)), default=None)
    if answer is None:
        return UNSTATED
    tools = body.get("tools")
    again = len(msgspec.json.encode(tools)) if tools else 0
    return images + beside + again + _normalised(raw) + TEMPLATE_TOKENS + answer


def _normalised(raw: bytes) -> int:
    """Bytes that a tokenizer's NFC may add to a text: it adds none to nearly all of them."""
    if raw.isascii():
        return 0
    high = raw.translate(None, _ASCII)
    if unicodedata.is_normalized("NFC", high.decode("utf-8", "replace")):
        return 0
    return (_NFC - 1) * len(high)
