"""A closed loop of requests to a server: so many at once, each answered before the next.

Two ways to the same engine are driven in turns, after requests that warm both up and do not count;
so neither is the one that finds the engine cold.
"""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from turbofit.core.images.rule import DummyImage
from turbofit.core.plan import Plan
from turbofit.launch.engine.worst_requests import chat, image_part, worst_request

__all__ = ["Load", "drive", "question"]

_SIZE = (896, 896)
#: Connections that break in a row before nothing more is asked.
_BROKEN = 3


@dataclass(frozen=True)
class Load:
    """What is asked, of each way. ``seconds`` bounds a way: no request begins later.

    ``worst``: the plan's worst image in each request, else one of 896 x 896. ``tokens``: words
    that each answer has, whatever the model says. ``ways``: straight at the engine, and through the
    gateway. ``warm``: requests of a way that come before and do not count. ``turns``: into how many
    parts the requests of a way are cut.
    """

    requests: int
    concurrency: int
    seconds: float
    tokens: int = 64
    worst: bool = False
    ways: tuple[str, ...] = ("direct", "gateway")
    warm: int = 16
    turns: int = 4


#: Where a way goes: the server, and its key.
Way = tuple[str, str | None]


class Part:
    """Requests of one way, and what came of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.took: list[float] = []
        self.tokens: list[int] = []
        self.statuses: dict[int, int] = {}
        #: Answers that said when to try again, by status.
        self.refused: dict[int, int] = {}
        self.seconds, self.broken, self.begun = 0.0, 0, 0
        #: Requests a second of each turn.
        self.rates: list[float] = []

    def answered(self, status: int, took: float, tokens: int) -> None:
        """One request came to its end."""
        with self.lock:
            self.statuses[status] = self.statuses.get(status, 0) + 1
            self.broken = 0 if status else self.broken + 1
            if status == http.client.OK:
                self.took.append(took)
                self.tokens.append(tokens)

    def document(self, load: Load) -> dict[str, Any]:
        """What came of it: statuses that requests ended with, rates, times in seconds."""
        seconds, count = self.seconds or 1.0, len(self.took)
        missing = {f"status {k}": v for k, v in self.statuses.items() if k != http.client.OK}
        if load.requests > self.begun:
            missing["not asked"] = load.requests - self.begun
        return {
            "load": asdict(load), "statuses": {str(k): v for k, v in sorted(self.statuses.items())},
            "answered": count, "unanswered": missing,
            "refused": {str(k): v for k, v in sorted(self.refused.items())},
            "seconds": round(self.seconds, 3), "turns": self.rates,
            "requests_per_second": count / seconds,
            "tokens_per_second": sum(self.tokens) / seconds,
            "median_seconds": statistics.median(self.took) if self.took else None,
            "longest_seconds": max(self.took, default=None),
        }  # fmt: skip


def question(plan: Plan, model: str, load: Load) -> dict[str, Any]:
    """The body of a chat request."""
    if plan.limits.vision_unit is None:
        made = chat(model, [])
    elif load.worst:
        found = worst_request(plan, model)
        assert found is not None
        made = found.request
    else:
        made = chat(model, [image_part(DummyImage(_SIZE, {}))])
    return {**made.body, "max_tokens": load.tokens, "ignore_eos": True}


def drive(plan: Plan, model: str, ways: Mapping[str, Way], load: Load) -> dict[str, Any]:
    """Ask each way of the load in turns; its document by the way's name.

    A request that is told when to try again (Retry-After) is asked again then, as a client would;
    its time is from its first try. A connection that breaks counts as status 0, and after three in
    a row nothing more is asked of that way. ``unanswered`` counts what was not answered, and why.
    """
    body = json.dumps(question(plan, model, load)).encode()
    parts = {name: Part() for name in load.ways if name in ways}
    for name in parts:
        _turn(ways[name], body, Part(), load.warm, load.concurrency, load.seconds / load.turns)
    for number in range(load.turns):
        count = load.requests * (number + 1) // load.turns - load.requests * number // load.turns
        # There and back: what drifts (clocks, heat) falls on both alike.
        for name in parts if number % 2 == 0 else reversed(parts):
            part, room = parts[name], load.seconds * (number + 1) / load.turns
            _turn(ways[name], body, part, count, load.concurrency, room - part.seconds)
    return {name: part.document(load) for name, part in parts.items()}


def _turn(
    way: Way, body: bytes, part: Part, count: int, concurrency: int, seconds: float
) -> None:  # fmt: skip
    """So many requests, none of which begins after so many seconds."""
    begun, answered, left = time.monotonic(), len(part.took), [count]

    def work() -> None:
        while time.monotonic() - begun < seconds:
            with part.lock:
                if left[0] <= 0 or part.broken >= _BROKEN:
                    return
                left[0] -= 1
                part.begun += 1
            at = time.monotonic()
            status, tokens = _until(way, body, part, begun + seconds)
            part.answered(status, time.monotonic() - at, tokens)

    threads = [threading.Thread(target=work) for _ in range(concurrency)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    spent = time.monotonic() - begun
    part.seconds += spent
    if count:
        part.rates.append((len(part.took) - answered) / spent)


def _until(way: Way, body: bytes, part: Part, end: float) -> tuple[int, int]:
    """Ask, and again as long as the server says when to."""
    while True:
        status, tokens, again = _ask(*way, body)
        if again is None or time.monotonic() + again > end:
            return status, tokens
        with part.lock:
            part.refused[status] = part.refused.get(status, 0) + 1
        time.sleep(again)


def _ask(url: str, key: str | None, body: bytes) -> tuple[int, int, float | None]:
    """Status (0: the connection broke), the answer's tokens, seconds after which to try again."""
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
            again = answer.headers.get("Retry-After", "")
            return answer.status, 0, float(again) if again.isdigit() else None
        return answer.status, int(json.loads(raw)["usage"]["completion_tokens"]), None
    except (OSError, http.client.HTTPException, ValueError, LookupError):
        return 0, 0, None
    finally:
        connection.close()
