"""Refusals: answers to requests that are not passed on, in the form of the client's API."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Literal

import msgspec

from turbofit.core.presets import read_preset
from turbofit.core.struct import Struct

#: A header in refusals of requests that no engine has received; its value is the reason. A front
#: may send such a request to another node.
UNREACHED: Final = "x-turbofit-unreached"
BUSY: Final = "busy"
_UNREACHED: Final = frozenset({"engine_unavailable", "engine_resting", "ending", BUSY})

#: The APIs, each with its own form of errors; ``generate`` is LMDeploy's own API.
Api = Literal["openai", "responses", "anthropic", "generate"]

_OPENAI_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error", 500: "server_error", 503: "server_error",
}  # fmt: skip
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip

#: Seconds after which a client may try again, when a server ends.
_RETRY_ENDING: Final = 10


#: Words of LMDeploy's error when its server lacks an option for a request, each with the key of a
#: refusal. The key ends with the field of the request.
#: Source: lmdeploy chat_completions/validation.py `launch the api_server with --tool-call-parser`
_NEEDED: Final = {
    b"launch the api_server with --tool-call-parser": "option_missing:tools",
    b"not enabled logprobs_mode": "option_missing:logprobs",
    b"logprobs_mode is not enabled": "option_missing:logprobs",
    b"May start api_server with --enable-return-routed-experts": (
        "option_missing:return_routed_experts"
    ),
}

#: The most characters that a refusal repeats of an engine's error that is not JSON.
_SAID: Final = 500


class _Row(Struct):
    status: int
    says: str
    more: str


@cache
def refusals() -> dict[str, _Row]:
    return read_preset("", "refusals", dict[str, _Row])


class Refusal(Exception):  # noqa: N818 - not a failure of the gateway, but its answer
    """The answer to a request that is not passed on.

    Args:
        key: names a row of `presets/refusals.yaml`. The part before a colon is the ``reason``, a
          short stable word for machines; the part after the colon names a variant of the sentence.
        param: the field at fault, if there is one.
        retry_after: seconds after which a client may try again, if another try may help.
        status: the HTTP status; None takes the status of the row.
        facts: values for the placeholders in the sentence.
    """

    def __init__(
        self,
        key: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        status: int | None = None,
        **facts: object,
    ) -> None:
        row = refusals()[key]
        self.key, self.facts = key, facts
        self.status, self.reason = status or row.status, key.partition(":")[0]
        self.message = row.says.format(param=param, **facts)
        super().__init__(self.message)
        self.param, self.retry_after = param, retry_after

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of the refusal: when to try again, and why no engine had the request."""
        unreached = self.status == 503 and self.reason in _UNREACHED
        headers = [(UNREACHED.encode(), self.reason.encode())] if unreached else []
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


def ending() -> Refusal:
    return Refusal("ending", retry_after=_RETRY_ENDING)


def refusal_of_engine(api: Api, status: int, body: bytes) -> Refusal | None:
    """Return the refusal for an engine's error; a known error gets turbofit's own sentence.

    ``body`` is the engine's answer. Return None if this answer already has the form of the API.
    """
    for words, key in _NEEDED.items():
        if words in body:
            return Refusal(key, param=key.partition(":")[2])
    try:
        document = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        document = body.decode("utf-8", "replace")[:_SAID]
    error = document if isinstance(document, dict) else {"message": document}
    # This answer has the form of the API already.
    if isinstance(error.get("error"), dict) and (api != "anthropic" or error.get("type")):
        return None
    said, param = error.get("message") or error.get("detail") or document, error.get("param")
    key = "engine_refused" if status < 500 else "engine_failed"
    return Refusal(key, status=status, said=said, param=param if isinstance(param, str) else None)


def refusal_body(api: Api, refusal: Refusal, request_id: str) -> bytes:
    if api == "anthropic":
        document = {**_anthropic(refusal), "request_id": request_id}
    elif api == "generate":
        of_lmdeploy = {"code": refusal.status, "object": "error", "reason": refusal.reason}
        document = {**_openai(refusal), **of_lmdeploy}
    else:
        document = {"error": _openai(refusal)}
    return msgspec.json.encode(document)


def refusal_event(api: Api, refusal: Refusal) -> bytes:
    """Return the error event that ends a stream whose client has the first events already."""
    if api == "anthropic":
        document = _anthropic(refusal)
    elif api == "responses":
        document = {**_openai(refusal), "type": "error", "sequence_number": 0}
    else:
        error = msgspec.json.encode({"error": _openai(refusal)})
        return b"data: " + error + b"\n\ndata: [DONE]\n\n"
    return b"event: error\ndata: " + msgspec.json.encode(document) + b"\n\n"


def _openai(refusal: Refusal) -> dict[str, Any]:
    """Return a refusal as an error object of OpenAI's API."""
    return {
        "message": refusal.message,
        "type": _OPENAI_TYPES.get(refusal.status, "invalid_request_error"),
        "param": refusal.param,
        "code": refusal.reason,
    }


def _anthropic(refusal: Refusal) -> dict[str, Any]:
    """Return a refusal as an error object of Anthropic's API."""
    kind = _ANTHROPIC_TYPES.get(refusal.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": refusal.message}}
