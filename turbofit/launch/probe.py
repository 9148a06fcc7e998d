"""Is it ready? Its health first, then one request as bad as the plan allows, really answered."""

from __future__ import annotations

import http.client
import json
import threading
import time
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError
from turbofit.launch.image import flat_png, knobs, worst_size

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["Probe", "worst_request"]

_PAUSE: Final = 0.3
_HEALTH_TIMEOUT: Final = 5.0
#: Preprocessing a 12-megapixel image on a slow CPU and a cold vision tower take seconds.
_ANSWER_TIMEOUT: Final = 600.0


class Probe(threading.Thread):
    """Asks one engine until it is ready; then ``ready`` is set, or ``error`` says why not.

    Args:
        plan: what the worst case is.
        host: where it listens.
        port: where it listens.
        key: its API key, where it has one.
        check: whether an image request must be answered too.
    """

    def __init__(self, plan: Plan, host: str, port: int, key: str | None, *, check: bool) -> None:
        super().__init__(name=f"probe-{port}", daemon=True)
        self._plan, self._address, self._key, self._check = plan, (host, port), key, check
        self._stopped = threading.Event()
        self.healthy = threading.Event()
        self.ready = threading.Event()
        self.error: LaunchError | None = None

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def run(self) -> None:
        """Wait for health, then check."""
        while not self._stopped.wait(_PAUSE):
            if self._is_healthy():
                self.healthy.set()
                break
        if self._stopped.is_set():
            return
        try:
            if self._check:
                self._ask_worst()
            self.ready.set()
        except LaunchError as exc:
            self.error = exc
        except (OSError, http.client.HTTPException):
            # The connection broke: the engine died of it. Whoever watches the process says why.
            time.sleep(2.0)
            self.error = LaunchError(
                "the engine broke the connection of a worst-case image request",
                hint="see its log",
            )

    def _is_healthy(self) -> bool:
        try:
            status, _ = self._call("GET", "/health", timeout=_HEALTH_TIMEOUT)
        except (OSError, http.client.HTTPException):
            return False
        return status == http.client.OK

    def _ask_worst(self) -> None:
        status, body = self._call("GET", "/v1/models", timeout=60.0)
        name = _first_model(body) if status == http.client.OK else None
        if name is None:
            raise LaunchError(
                f"the engine answered {status} when asked for its models", hint="see its log"
            )
        request = worst_request(self._plan, name)
        if request is None:
            return
        status, body = self._call("POST", "/v1/chat/completions", request, timeout=_ANSWER_TIMEOUT)
        if status != http.client.OK:
            said = body[:300].decode(errors="replace")
            raise LaunchError(
                f"the engine answered {status} to a worst-case image request: {said}",
                hint="see its log; --no-check skips this request",
            )

    def _call(
        self, method: str, path: str, body: Any = None, *, timeout: float
    ) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection = http.client.HTTPConnection(*self._address, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, body=data, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def worst_request(plan: Plan, model: str) -> dict[str, Any] | None:
    """A chat request with as many images as the plan allows, each of the worst size.

    None for a model without images.
    """
    size = worst_size(plan)
    if size is None:
        return None
    url = "data:image/png;base64," + b64encode(flat_png(*size)).decode()
    part = {"type": "image_url", "image_url": {"url": url, **knobs(plan)}}
    text = {"type": "text", "text": "What is this?"}
    content = [text, *([part] * plan.limits.images_per_request)]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0,
    }


def _first_model(body: bytes) -> str | None:
    try:
        name = json.loads(body)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None
