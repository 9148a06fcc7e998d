"""The longest request, as text: this engine takes no token ids, and only it has the tokenizer.

Its counts for two short prompts say how many tokens one more word takes. The request has the worst
images too, so that the peak is driven as the plan pays for it before a client can.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Final

from turbofit.launch.engine.worst_requests import ProbeRequest, WorstRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.plan import Plan

__all__ = ["longest_request"]

_WORD: Final = " a"
_PROBE_TOKENS: Final = 64
#: A word is two tokens at the most, where each byte is one: two short prompts fit so many times.
_SHORT: Final = 8
_ANSWER: Final = 2
#: Of the room: a tokenizer that joins words elsewhere than in a short prompt must not exceed it.
_SHARE: Final = 0.99


def longest_request(
    plan: Plan,
    model: str,
    worst: ProbeRequest | None,
    tokens: int,
    count: Callable[[ProbeRequest], int],
) -> ProbeRequest | None:
    """A request that fills the context.

    Args:
        plan: what was planned.
        model: the name to ask for.
        worst: the request with the worst images, None for a model without.
        tokens: of its prompt.
        count: asks the engine, and says how many tokens the prompt had; 0: it does not say.

    Returns:
        None where the engine does not count, or has no room left.
    """
    least = max(1, min(_PROBE_TOKENS, plan.settings.session_len // _SHORT))
    few, more = (
        count(ProbeRequest("a short prompt", _words_prompt(model, n))) for n in (least, 2 * least)
    )
    each = (more - few) / least
    if each <= 0:
        return None
    taken = tokens if worst is not None else few - least * each
    word_count = int((plan.settings.session_len - _ANSWER - taken) / each * _SHARE)
    if word_count < 1:
        return None
    if worst is None:
        return ProbeRequest("the longest prompt", _words_prompt(model, word_count))
    body = copy.deepcopy(worst.request.body)
    body["messages"][0]["content"].append({"type": "text", "text": _WORD * word_count})
    return ProbeRequest("the longest request", WorstRequest(worst.request.path, body))


def _words_prompt(model: str, count: int) -> WorstRequest:
    body = {"model": model, "prompt": _WORD * count, "max_tokens": 1, "temperature": 0}
    return WorstRequest("/v1/completions", body)
