"""Asks an engine on loopback by blocking HTTP requests whether the engine is ready and alive."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from turbofit.core.errors import LaunchError
from turbofit.core.process.network import LOOPBACK, opened
from turbofit.core.struct import Struct
from turbofit.gateway.http.routes import first_model
from turbofit.serving.engine.worst_requests import ProbeRequest

#: Takes the model's name, and a function that sends a request and returns its prompt's tokens.
AskEngine = Callable[[str, Callable[[ProbeRequest], int]], None]

#: Errors of a call to an engine that does not answer.
FAILURES = (OSError, http.client.HTTPException)
_PAUSE: Final = 0.2
_HEALTH_TIMEOUT: Final = 5.0
#: Seconds in which the supervisor notices the death of the engine's process.
_DEATH_SECONDS: Final = 2.0
_LIVENESS_FAILURES: Final = 3


@dataclass
class EngineClient:
    """Sends requests to one engine; ``key`` is the API key, ``model`` the name of the model."""

    port: int
    key: str | None
    model: str | None = None

    def call(self, path: str, body: Any = None, *, timeout: float) -> tuple[int, bytes]:
        """Send one request; return the status and the body.

        Raises:
            OSError: the engine does not answer.
            http.client.HTTPException: the answer is not HTTP.
        """
        url = f"http://{LOOPBACK}:{self.port}{path}"
        with opened(url, body, self.key, timeout=timeout) as response:
            return response.status, response.read()

    def is_healthy(self, timeout: float) -> bool:
        return self._answers("/health", None, timeout)

    def find_model(self, timeout: float) -> tuple[int, str | None]:
        """Ask for the engine's list of models; return the HTTP status and the first model's name.

        The name is also kept in ``model``. The name is None if the status is not 200.
        """
        status, body = self.call("/v1/models", timeout=timeout)
        self.model = first_model(body) if status == http.client.OK else None
        return status, self.model

    def completes(self, timeout: float) -> bool:
        body = {"model": self.model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        return self._answers("/v1/completions", body, timeout)

    def _answers(self, path: str, body: Any, timeout: float) -> bool:
        """Return whether a request gets status 200 in time."""
        with suppress(*FAILURES):
            return self.call(path, body, timeout=timeout)[0] == http.client.OK
        return False


class Timing(Struct):
    """Deadlines and pauses, in seconds.

    An engine that has ended more than ``restarts`` times within ``window`` rests for ``window``.
    ``liveness`` is the time between two test completions; a completion may take ``patience``. See
    `supervised_engine.Silence` for ``silence`` and ``longest_silence``. After ``quiet`` without a
    line of a starting engine, a message explains the silence.
    """

    tick: float = 0.1
    start: float = 2 * 3600.0
    drain: float = 30.0
    liveness: float = 60.0
    patience: float = 10.0
    silence: float = 45.0
    longest_silence: float = 300.0
    quiet: float = 180.0
    backoff: float = 1.0
    longest_backoff: float = 60.0
    restarts: int = 5
    window: float = 600.0


class Probe(threading.Thread):
    """Asks an engine during one start until the engine is ready, then tests the engine regularly.

    ``healthy`` is set when the engine answers its health page. ``worst_cases`` sends the worst-case
    requests; ``ready`` is set after their answers. ``error`` is the reason if the engine cannot
    become ready. ``unanswered`` is set after three tests in a row that failed with an error.
    ``owes`` is True while the engine owes an answer: a starting engine that listens owes its first
    answer, a ready engine the answer to a test. ``serial``: the engine answers one request at a
    time.
    """

    def __init__(
        self,
        client: EngineClient,
        timing: Timing,
        worst_cases: AskEngine | None,
        *,
        serial: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="probe", daemon=True)
        self._client, self._timing, self.worst_cases = client, timing, worst_cases
        self._serial, self._clock = serial, clock
        self._stopped = threading.Event()
        self.healthy = threading.Event()
        self.ready = threading.Event()
        self.error: LaunchError | None = None
        #: The time at which the last answered test was sent to the ready engine.
        self.lived = float("-inf")
        self.unanswered = False
        #: Whether the engine owes an answer, the time of the question, the time of the last answer.
        self.owes, self.asked_at, self.last_byte_at = False, float("-inf"), float("-inf")

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        """Wait for a healthy engine, send the worst-case requests, then test the engine."""
        if not self._comes_up():
            return
        if self._stopped.is_set():  # an engine that is to end gets no worst cases
            return
        self.healthy.set()
        try:
            status, name = self._client.find_model(60.0)
            if name is None:
                raise LaunchError(
                    f"the engine answered {status} to /v1/models", hint="see the engine's log"
                )
            if self.worst_cases is not None:
                self.worst_cases(name, self._ask)
        except LaunchError as exc:
            self.error = exc
        except FAILURES as exc:
            # If the engine died of the request, the supervisor finds the reason during this pause.
            time.sleep(_DEATH_SECONDS)
            self.error = LaunchError(
                f"a worst-case request got no answer: {exc}", hint="see the engine's log"
            )
        else:
            self.ready.set()
            if self._timing.liveness:
                self._look_after()

    def _comes_up(self) -> bool:
        """Ask until the engine is healthy; return False if this probe is stopped."""
        while True:
            began = self._clock()
            if self._client.is_healthy(_HEALTH_TIMEOUT):
                self.owes = False
                return True
            # An engine that does not listen yet refuses connections, and owes no answer.
            late = self._clock() - began >= _HEALTH_TIMEOUT
            if late and not self.owes:
                self.asked_at = self._clock()
            self.owes = late
            if self._stopped.wait(_PAUSE):
                return False

    def _look_after(self) -> None:
        """Test a ready engine regularly, until three tests in a row have failed."""
        # A serial engine queues completions; its /health says whether tokens still come.
        ask = self._client.is_healthy if self._serial else self._client.completes
        failures = 0
        while not self._stopped.wait(1.0 if self.owes else self._timing.liveness):
            began = self._clock()
            if not self.owes:
                self.asked_at, self.owes = began, True
            if ask(self._timing.patience):
                self.last_byte_at = self._clock()
                failures, self.lived, self.owes = 0, began, False
            elif self._clock() - began < self._timing.patience:  # `Silence` judges late answers
                failures += 1
            if failures >= _LIVENESS_FAILURES:
                self.unanswered = True
                return

    def _ask(self, question: ProbeRequest) -> int:
        """Send a request; return the tokens of its prompt, or 0 if the answer has no count."""
        # A small card may take an hour for the largest image, so the whole start's limit counts.
        status, answer = self._client.call(question.path, question.body, timeout=self._timing.start)
        if status != http.client.OK:
            text = answer[:300].decode(errors="replace")
            raise LaunchError(
                f"the engine answered {status} to {question.name}: {text}",
                hint="see the engine's log; --check none skips this request",
            )
        try:
            return int(json.loads(answer)["usage"]["prompt_tokens"])
        except (ValueError, LookupError, TypeError):
            return 0
