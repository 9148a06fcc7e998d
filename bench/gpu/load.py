"""A closed loop of requests to a server: so many at once, each answered before the next."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from turbofit.core.plan import Plan
from turbofit.launch.readiness import chat, image_part, worst_request

__all__ = ["Load", "drive", "question"]

_SIZE = (896, 896)


@dataclass(frozen=True)
class Load:
    """What is asked. ``seconds`` bounds it: no request begins later.

    ``worst``: the plan's worst image in each request, else one of 896 x 896. ``tokens``: words
    that each answer has, whatever the model says. ``ways``: straight at the engine, and through the
    gateway.
    """

    requests: int
    concurrency: int
    seconds: float
    tokens: int = 64
    worst: bool = False
    ways: tuple[str, ...] = ("direct", "gateway")


def question(plan: Plan, model: str, load: Load) -> dict[str, Any]:
    """The body of a chat request."""
    if plan.limits.vision_unit is None:
        made = chat(model, [])
    elif load.worst:
        found = worst_request(plan, model)
        assert found is not None
        made = found.request
    else:
        made = chat(model, [image_part(_SIZE, {})])
    return {**made.body, "max_tokens": load.tokens, "ignore_eos": True}


def drive(plan: Plan, model: str, url: str, key: str | None, load: Load) -> dict[str, Any]:
    """Ask; what came of it: answers by status, requests and tokens a second, times in seconds.

    A connection that breaks counts as status 0, and after three in a row nothing more is asked.
    """
    body = json.dumps(question(plan, model, load)).encode()
    lock, left, broken = threading.Lock(), [load.requests], [0]
    took: list[float] = []
    tokens: list[int] = []
    statuses: dict[int, int] = {}
    begun = time.monotonic()

    def work() -> None:
        while time.monotonic() - begun < load.seconds:
            with lock:
                if left[0] <= 0 or broken[0] >= 3:
                    return
                left[0] -= 1
            at = time.monotonic()
            status, count = _ask(url, key, body)
            with lock:
                statuses[status] = statuses.get(status, 0) + 1
                broken[0] = 0 if status else broken[0] + 1
                if status == http.client.OK:
                    took.append(time.monotonic() - at)
                    tokens.append(count)

    threads = [threading.Thread(target=work) for _ in range(load.concurrency)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    seconds = time.monotonic() - begun
    return {
        "load": asdict(load), "statuses": {str(k): v for k, v in sorted(statuses.items())},
        "answered": len(took), "seconds": round(seconds, 3),
        "requests_per_second": len(took) / seconds, "tokens_per_second": sum(tokens) / seconds,
        "median_seconds": statistics.median(took) if took else None,
        "longest_seconds": max(took, default=None),
    }  # fmt: skip


def _ask(url: str, key: str | None, body: bytes) -> tuple[int, int]:
    """Status (0: the connection broke) and the answer's tokens."""
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", body=body, headers=headers)
        answer = connection.getresponse()
        raw = answer.read()
        if answer.status != http.client.OK:
            return answer.status, 0
        return answer.status, int(json.loads(raw)["usage"]["completion_tokens"])
    except (OSError, http.client.HTTPException, ValueError, LookupError):
        return 0, 0
    finally:
        connection.close()
