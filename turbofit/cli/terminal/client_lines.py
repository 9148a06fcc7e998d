"""What a client types to ask a server: a line for a shell, one for Python."""

from __future__ import annotations

import json
import shlex

__all__ = ["client_lines"]


def client_lines(url: str, model: str, *, key: bool) -> list[str]:
    """Lines that work as they are pasted, once ``API_KEY`` is set where there is a key.

    Args:
        url: of the gateway.
        model: as clients name it.
        key: whether the gateway wants one.
    """
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    headers = ["-H 'Content-Type: application/json'"]
    if key:
        headers.append('-H "Authorization: Bearer $API_KEY"')
    secret = 'os.environ["API_KEY"]' if key else '"none"'
    return [
        f"curl {url}/v1/chat/completions {' '.join(headers)} -d {shlex.quote(json.dumps(body))}",
        f'openai.OpenAI(base_url="{url}/v1", api_key={secret}).chat.completions.create('
        f'model="{model}", messages=[{{"role": "user", "content": "Hello"}}])',
    ]
