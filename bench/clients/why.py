"""Why the gateway answers otherwise, where it does so on purpose."""

from __future__ import annotations

__all__ = ["why"]

_CLOSED = "closed, with the reason: its GPU memory is in no plan"
#: By the name of a check, whichever suite has it.
_CHECKS = {
    "a body in UTF-16": "JSON between systems is UTF-8 (RFC 8259)",
    "a slash at the end of a path": "plain redirects, which clients with a body need not follow",
    "HEAD /health": "taken: load balancers ask so",
    "GET /metrics": "the gateway has metrics of its own",
    "/v1/encode of 300 KiB": "256 KiB at once: the engine answers nobody else meanwhile",
    "/pooling": _CLOSED,
    "/get_ppl": _CLOSED,
    "/is_sleeping": "closed: routes that manage the engine",
    "a part of unknown type": "refused: an answer that never saw it would pass for one that did",
    "text/plain": "another 4xx for the same: it must be application/json",
    "a web page": "closed without --allow-origins, which the message names",
    "error: embeddings": "closed, with the reason; LMDeploy makes none",
    "count_tokens of an image": "plain counts the base64 as text; the gateway counts image tokens, "
    "without the two that Qwen2-VL puts around each image",
}


def why(check: str) -> str | None:
    """The reason, or nothing where nobody knows one."""
    return _CHECKS.get(check)
