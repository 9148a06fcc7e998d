"""How many tokens of an engine's cache a request can ever hold, without a tokenizer. Over."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.gateway.limits.cost import UNSTATED
from turbofit.gateway.limits.parameters import ANSWER_LENGTHS

if TYPE_CHECKING:
    from turbofit.core.json_types import JsonObject

__all__ = ["most_tokens"]

#: What a chat template adds by itself: the longest system prompt of LMDeploy's templates has 509
#: bytes (`lmdeploy/model.py`). Over; under for a checkpoint's own template that adds more. What it
#: adds to a message or an image is less than the JSON around them.
_TEMPLATE: Final = 640
_ASCII: Final = bytes(range(128))
#: Bytes that NFC makes of one byte at most (Unicode Standard Annex 15, table of expansion factors).
_NFC: Final = 3


def most_tokens(kind: str, body: JsonObject, raw: bytes, beside: int, images: int) -> int:
    """Tokens of the prompt and of the longest answer of one copy.

    A token of a text has one byte at least. Under for a tokenizer that normalises by NFKC, and for
    a template that writes tools more than twice as long as they came.

    Args:
        kind: of route.
        body: as it is passed on.
        raw: its JSON.
        beside: bytes of that which are not images.
        images: tokens of the images.

    Returns:
        `UNSTATED` where the answer's length is not stated: the session ends it.
    """
    stated = [body.get(name) for name in ANSWER_LENGTHS.get(kind, ())]
    answer = max((length for length in stated if isinstance(length, int)), default=None)
    if answer is None:
        return UNSTATED
    tools = body.get("tools")
    again = len(msgspec.json.encode(tools)) if tools else 0
    return images + beside + again + _normalised(raw) + _TEMPLATE + answer


def _normalised(raw: bytes) -> int:
    """Bytes that a tokenizer's NFC may add to a text: it adds none to nearly all of them."""
    if raw.isascii():
        return 0
    high = raw.translate(None, _ASCII)
    if unicodedata.is_normalized("NFC", high.decode("utf-8", "replace")):
        return 0
    return (_NFC - 1) * len(high)
