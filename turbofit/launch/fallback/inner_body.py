"""What a client asks, made into what ``transformers serve`` takes."""

from __future__ import annotations

import json
from typing import Any, Final

from turbofit.launch.fallback.errors import RequestRefused

__all__ = ["CHAT", "COMPLETIONS", "inner_body"]

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

#: What the inner server takes and heeds; it answers 422 to any key that it does not know.
_COMMON: Final = frozenset(
    {"model", "stream", "temperature", "top_p", "seed", "max_tokens", "frequency_penalty", "stop"}
)
_PARAMETERS: Final = {
    CHAT: _COMMON | {"messages", "tools", "logit_bias", "chat_template_kwargs"},
    COMPLETIONS: _COMMON | {"prompt"},
}
_NUMBERS: Final = ("temperature", "top_p", "max_tokens", "seed", "frequency_penalty")
_IMAGES: Final = ("image_url", "input_image")
_LEAST_TOP_P: Final = 1e-6


def inner_body(path: str, data: bytes, name: str, session_len: int, max_images: int) -> bytes:
    """The body for the inner server.

    Args:
        path: `CHAT` or `COMPLETIONS`.
        data: the client's body.
        name: the model that is served.
        session_len: tokens that a request may have: an answer without a limit ends there.
        max_images: of one request.

    Raises:
        RequestRefused: it is no request of this API, or for another model.
    """
    body = _object(data)
    if body.get("model") not in (None, name):
        raise RequestRefused(404, f"The model '{body['model']}' does not exist.", "not_found_error")
    made = {key: body[key] for key in _PARAMETERS[path] if body.get(key) is not None}
    made = {"max_tokens": session_len, **made, "model": name}
    if body.get("max_completion_tokens") is not None:
        made["max_tokens"] = body["max_completion_tokens"]
    _numbers(made)
    if path == CHAT:
        made["messages"] = _messages(body.get("messages"), max_images)
    else:
        made["prompt"] = _prompt(body.get("prompt"))
    return json.dumps(made).encode()


def _object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise RequestRefused(400, "the body is no JSON") from None
    if not isinstance(body, dict):
        raise RequestRefused(400, "the body is no JSON object")
    if body.get("n") not in (None, 1):
        raise RequestRefused(400, "n is 1 at most: this server answers one request at a time")
    return body


def _numbers(made: dict[str, Any]) -> None:
    for key in _NUMBERS:
        value = made.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RequestRefused(400, f"{key} must be a number")
    if made["max_tokens"] < 1:
        raise RequestRefused(400, "max_tokens must be at least 1")
    if made.get("temperature", 0) < 0:
        raise RequestRefused(400, "temperature must not be negative")
    if "top_p" in made:
        if not 0 <= made["top_p"] <= 1:
            raise RequestRefused(400, "top_p must lie between 0 and 1")
        made["top_p"] = max(_LEAST_TOP_P, made["top_p"])
    if "logit_bias" in made:
        biases = _biases(made.pop("logit_bias"))
        if biases:  # Transformers takes no empty ones
            made["logit_bias"] = biases


def _biases(given: Any) -> dict[str, float]:
    try:
        return {str(int(token)): float(value) for token, value in given.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise RequestRefused(400, "logit_bias must be an object of token ids and numbers") from None


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise RequestRefused(400, "prompt must be one string")
    return prompt


def _messages(messages: Any, max_images: int) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestRefused(400, "messages must be a list of at least one message")
    images = 0
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestRefused(400, "each message must be an object with a role")
        images += _images(message.get("content"))
    if images > max_images:
        raise RequestRefused(
            400, f"the request has {images} images, this server takes {max_images}"
        )
    return messages


def _images(content: Any) -> int:
    """How many images a message has.

    Raises:
        RequestRefused: one of them is not inline: the inner server would read any address or file.
    """
    if content is None or isinstance(content, str):
        return 0
    if not isinstance(content, list):
        raise RequestRefused(400, "content must be a string or a list of parts")
    count = 0
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            continue
        if kind not in _IMAGES:
            raise RequestRefused(
                400, f"parts of type {kind!r} are not taken: text and image_url are"
            )
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not url.startswith("data:image/"):
            raise RequestRefused(400, "images are taken inline only: data:image/...;base64,...")
        count += 1
    return count
