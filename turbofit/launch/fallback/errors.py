"""Errors in the OpenAI form, and which failures are the client's."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["RequestRefused", "error_body", "of_client", "refused_by"]


class RequestRefused(Exception):  # noqa: N818 - an answer
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


def error_body(refused: RequestRefused) -> bytes:
    """The body of an error."""
    error = {
        "message": refused.message, "type": refused.kind, "param": None, "code": refused.status,
    }  # fmt: skip
    return json.dumps({"error": error}).encode()


def refused_by(status: int, body: bytes) -> RequestRefused:
    """The inner server's own refusal (``{"detail": ...}``) in our form."""
    try:
        said = json.loads(body)
        detail = said.get("detail", said.get("error", said)) if isinstance(said, dict) else said
    except ValueError:
        detail = body.decode(errors="replace")
    message = detail if isinstance(detail, str) else json.dumps(detail)
    status = 400 if status == 422 else status
    return RequestRefused(
        status, message, "invalid_request_error" if status < 500 else "server_error"
    )


def of_client(exc: BaseException) -> bool:
    """Whether a failure before anything was generated is what the client sent.

    By then only its messages, its images and its options were read: pictures that cannot be
    decoded, roles that the chat template refuses, fields of another shape.
    """
    template = any(type(one).__module__.startswith("jinja2") for one in _chain(exc))
    kinds = (ValueError, OSError, LookupError, TypeError, AttributeError, OverflowError)
    return template or isinstance(exc, kinds)


def _chain(exc: BaseException | None) -> list[Any]:
    found: list[Any] = []
    while exc is not None and exc not in found:
        found.append(exc)
        exc = exc.__cause__
    return found
