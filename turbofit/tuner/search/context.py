"""Contexts: the shortest and the longest that a plan may have, and what a cache holds of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from turbofit.core.units import round_up
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.resolved_request import ResolvedRequest, vision_load_of

__all__ = [
    "CONTEXT_STEP", "MIN_TEXT_TOKENS", "ROUND_CONTEXT", "excess_tokens", "longest_context",
    "longest_held", "most_context", "shortest_context",
]  # fmt: skip

#: Contexts that are looked at are multiples of this.
CONTEXT_STEP: Final = 64
#: A round context, as people write them.
ROUND_CONTEXT: Final = 1024
#: Tokens of text and answer that a context must hold beside the images to be of use.
MIN_TEXT_TOKENS: Final = 1024
#: Of a context too short for so many, this share.
_TEXT_SHARE: Final = 8
#: A context that few requests miss.
_ENOUGH_CONTEXT: Final = 32768


def shortest_context(vision_load: VisionLoad) -> int:
    """The least ``session_len`` that serves the workload's request."""
    need = vision_load.tokens_per_request + MIN_TEXT_TOKENS
    return -(-need // CONTEXT_STEP) * CONTEXT_STEP


def most_context(request: ResolvedRequest) -> int:
    """The longest context that there may be: the user's, or else the model's own."""
    fixed = request.fixed.get("session_len", request.workload.context)
    return fixed if isinstance(fixed, int) else request.model.text.max_position_embeddings


def longest_context(request: ResolvedRequest) -> int:
    """The longest context that is promised: the user's, or the model's own up to 32,768.

    Few requests are longer, and longer ones let more images meet in TurboMind's forward. The goal
    of context has the model's own; images that need more get what they need. The least footprint
    has room for the workload's request alone.
    """
    most = most_context(request)
    if request.workload.goal == "context" or request.context_given:
        return most
    need = shortest_context(vision_load_of(request, request.requested_limit))
    if request.least:
        return min(most, need)
    return min(most, max(_ENOUGH_CONTEXT, need))


def excess_tokens(request: ResolvedRequest, vision_load: VisionLoad) -> int:
    """Tokens by which the images of one request and some text are more than any context here.

    What is promised together must be possible together: LMDeploy refuses a longer prompt, whatever
    the memory.
    """
    if not vision_load.units_per_image:
        return 0
    context = most_context(request)
    text = min(MIN_TEXT_TOKENS, context // _TEXT_SHARE)
    return max(0, vision_load.tokens_per_request + text - context)


def longest_held(held: Callable[[int], int], low: int, high: int) -> int:
    """The longest context between two of which the shorter is held and the longer is not.

    A longer context leaves no more tokens, so that each look bounds the answer on both sides: no
    context is held beyond the tokens that a shorter one leaves, and one of as many tokens as a
    longer one leaves is held. Two or three looks suffice, where bisection takes ten.

    Args:
        held: the KV tokens that the cache holds with a context; 0 where the engine does not start.
        low: a context that is held.
        high: a longer one that is not.

    Returns:
        A multiple of 64, or ``low``.
    """
    guess = held(high) // CONTEXT_STEP * CONTEXT_STEP
    while high - low > CONTEXT_STEP:
        half = (low + high) // 2 // CONTEXT_STEP * CONTEXT_STEP
        middle = guess if low < guess < high else half
        if middle <= low:
            break
        tokens = held(middle)
        if tokens >= middle:
            low, high = middle, min(high, round_up(tokens + 1, CONTEXT_STEP))
        else:
            high = middle
        guess = tokens // CONTEXT_STEP * CONTEXT_STEP
    return low
