"""What is said once a server is open: how it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.gateway.http.welcome import client_lines

if TYPE_CHECKING:
    from turbofit.launch.serve.config import ServeConfig

__all__ = ["to_ask"]


def to_ask(url: str, config: ServeConfig, model: str) -> list[str]:
    """Lines for a shell and for Python, and the address last; without a gateway the first engine's.

    Args:
        url: where it listens.
        config: of the server.
        model: as its engines call it.
    """
    gateway = config.gateway
    key = bool(config.api_key) if gateway is None else bool(gateway.api_keys)
    lines = [f"to ask: {line}" for line in client_lines(url, model, key=key)]
    browser = "" if gateway is None else f", or in a browser: {url}"
    return [*lines, f"to chat: turbofit chat {url}{browser}"]
