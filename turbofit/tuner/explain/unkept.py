"""Sentences on a given context that contradicts other values, or that the cache cannot keep."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.tuner.resolved_request import ResolvedRequest

__all__ = ["beyond_model", "unkept"]


def unkept(request: ResolvedRequest, *, session_len: int, kv_tokens: int) -> Iterator[str]:
    """A given context that the smallest cache, of ``kv_tokens``, does not hold."""
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
