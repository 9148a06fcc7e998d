"""Sentences on given values that contradict other given values, or that the cache cannot keep."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.messages import plural
from turbofit.tuner.resolved_request import ResolvedRequest

__all__ = ["beyond_model", "unkept"]


def unkept(
    request: ResolvedRequest, *, session_len: int, kv_tokens: int, at_once: int
) -> Iterator[str]:
    """Given numbers that the plan does not keep in full.

    Args:
        request: what was given.
        session_len: the engine's longest request, in tokens.
        kv_tokens: what the smallest cache holds.
        at_once: requests that all engines together run at once.
    """
    requests = request.workload.concurrency
    if requests is not None and requests > at_once:
        yield (
            f"{at_once:,} {plural(at_once, 'request')} at once, not {requests:,}: the others wait"
        )
    if request.context_given and session_len > kv_tokens:
        yield (
            f"the cache holds {kv_tokens:,} tokens, a session may have {session_len:,}: no longer"
            " request is served than the cache holds"
        )


def beyond_model(request: ResolvedRequest, session_len: int) -> Iterator[str]:
    """What a session longer than the model's own maximum means."""
    longest = request.model.text.max_position_embeddings
    if session_len > longest:
        yield (
            f"{request.model.name} reads {longest:,} tokens, a session may have {session_len:,}:"
            " LMDeploy takes longer requests, and the model was not made for them"
        )
