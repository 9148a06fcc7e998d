"""What a client types to ask a server: a line for a shell, one for Python."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from turbofit.launch.serve.config import ServeConfig

__all__ = ["client_lines", "to_ask"]

#: Tokens of the answer at most.
_ANSWER: Final = 50


def client_lines(url: str, model: str, *, key: bool) -> list[str]:
    """Lines that work as they are pasted, once ``API_KEY`` is set where there is a key."""
    messages = [{"role": "user", "content": "Hello"}]
    # On pretend GPUs no answer ends by itself.
    body = {"model": model, "messages": messages, "max_tokens": _ANSWER}
    headers = ["-H 'Content-Type: application/json'"]
    if key:
        headers.append('-H "Authorization: Bearer $API_KEY"')
    secret = 'os.environ["API_KEY"]' if key else '"none"'
    return [
        f"curl {url}/v1/chat/completions {' '.join(headers)} -d {shlex.quote(json.dumps(body))}",
        f'openai.OpenAI(base_url="{url}/v1", api_key={secret}).chat.completions.create('
        f"model={json.dumps(model)}, messages={json.dumps(messages)}, max_tokens={_ANSWER})",
    ]


def to_ask(url: str, config: ServeConfig, model: str) -> list[str]:
    """What is said once a server is open; without a gateway its first engine is asked."""
    gateway = config.gateway
    key = bool(config.api_key) if gateway is None else bool(gateway.api_keys)
    return [f"to ask: {line}" for line in client_lines(url, model, key=key)]
