"""What a client is told when its request is not passed on, in the form of the API it spoke."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

__all__ = ["Api", "Refusal", "ending", "refusal_body", "refusal_event"]

#: Who defined the error form; ``generate`` is LMDeploy's own.
Api = Literal["openai", "responses", "anthropic", "generate"]

_OPENAI_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error", 500: "server_error", 503: "server_error",
}  # fmt: skip
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip

#: Seconds after which another server may be there.
_RETRY_ENDING: Final = 10


class Refusal(Exception):  # noqa: N818 - not a failure of the gateway, but its answer
    """A request that is not passed on.

    Args:
        status: the HTTP status.
        reason: a short stable word for machines, e.g. ``too_many_images``.
        message: one sentence with the number that was asked and the limit.
        param: the field at fault, where there is one.
        retry_after: seconds after which to try again, where that may help.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message
        self.param, self.retry_after = param, retry_after


def ending() -> Refusal:
    """What everybody is told whose request the end of the server cuts off."""
    return Refusal(503, "ending", "the server is ending", retry_after=_RETRY_ENDING)


def refusal_body(api: Api, refusal: Refusal, request_id: str) -> bytes:
    """The JSON body of an error response."""
    if api == "anthropic":
        return msgspec.json.encode({**_anthropic(refusal), "request_id": request_id})
    if api == "generate":
        return msgspec.json.encode(
            {
                "message": refusal.message,
                "type": _OPENAI_TYPES.get(refusal.status, "invalid_request_error"),
                "code": refusal.status,
                "param": refusal.param,
                "object": "error",
                "reason": refusal.reason,
            }
        )
    return msgspec.json.encode(_openai(refusal))


def refusal_event(api: Api, refusal: Refusal, sequence: int = 0) -> bytes:
    """The event that ends a stream which had already begun.

    Args:
        api: whose stream it is.
        refusal: why it ends.
        sequence: ``sequence_number`` of a Responses stream.
    """
    if api == "anthropic":
        return b"event: error\ndata: " + msgspec.json.encode(_anthropic(refusal)) + b"\n\n"
    if api == "responses":
        document = {
            "type": "error",
            "code": refusal.reason,
            "message": refusal.message,
            "param": refusal.param,
            "sequence_number": sequence,
        }
        return b"event: error\ndata: " + msgspec.json.encode(document) + b"\n\n"
    return b"data: " + msgspec.json.encode(_openai(refusal)) + b"\n\ndata: [DONE]\n\n"


def _openai(refusal: Refusal) -> dict[str, Any]:
    return {
        "error": {
            "message": refusal.message,
            "type": _OPENAI_TYPES.get(refusal.status, "invalid_request_error"),
            "param": refusal.param,
            "code": refusal.reason,
        }
    }


def _anthropic(refusal: Refusal) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(refusal.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": refusal.message}}
