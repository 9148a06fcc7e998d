"""Requests to an engine on loopback, in plain blocking HTTP."""

from __future__ import annotations

import http.client
import json
from typing import Any

from turbofit.launch.engine.launches import HOST

__all__ = ["FAILURES", "EngineClient"]

#: What a call raises where the engine does not answer.
FAILURES = (OSError, http.client.HTTPException)


class EngineClient:
    """Asks one engine.

    Args:
        port: where it listens.
        key: its API key, where it has one.
    """

    def __init__(self, port: int, key: str | None) -> None:
        self._port, self.key = port, key
        self.model: str | None = None

    def call(
        self, method: str, path: str, body: Any = None, *, timeout: float
    ) -> tuple[int, bytes]:
        """One request; status and body.

        Raises:
            OSError: it does not answer.
            http.client.HTTPException: it answers something else than HTTP.
        """
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        connection = http.client.HTTPConnection(HOST, self._port, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, body=data, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def is_healthy(self, timeout: float) -> bool:
        """Whether its own health page is fine."""
        try:
            status, _ = self.call("GET", "/health", timeout=timeout)
        except FAILURES:
            return False
        return status == http.client.OK

    def find_model(self, timeout: float) -> tuple[int, str | None]:
        """The status of its list of models, and the first of them; remembered in ``model``."""
        status, body = self.call("GET", "/v1/models", timeout=timeout)
        try:
            name = json.loads(body)["data"][0]["id"] if status == http.client.OK else None
        except (ValueError, LookupError, TypeError):
            name = None
        self.model = name if isinstance(name, str) else None
        return status, self.model

    def completes(self, timeout: float) -> bool:
        """Whether it answers a completion of one token."""
        body = {"model": self.model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        try:
            status, _ = self.call("POST", "/v1/completions", body, timeout=timeout)
        except FAILURES:
            return False
        return status == http.client.OK
