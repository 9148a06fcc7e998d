"""Is it ready? Its health first, then requests as bad as the plan allows, really answered."""

from __future__ import annotations

import http.client
import threading
import time
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError
from turbofit.launch.asking import FAILURES, Client
from turbofit.launch.readiness import Question, questions

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["Probe"]

_PAUSE: Final = 0.2
_HEALTH_TIMEOUT: Final = 5.0
#: Preprocessing a 12-megapixel image on a slow CPU and a cold vision tower take seconds.
_ANSWER_TIMEOUT: Final = 600.0
#: Whoever watches the process learns of its death by then.
_DEATH_SECONDS: Final = 2.0


class Probe(threading.Thread):
    """Asks one engine until it is ready; then ``ready`` is set, or ``error`` says why not.

    Args:
        plan: what the worst case is.
        client: the engine.
        check: whether requests as bad as the plan allows must be answered too.
    """

    def __init__(self, plan: Plan, client: Client, *, check: bool) -> None:
        super().__init__(name="probe", daemon=True)
        self._plan, self._client, self.checks = plan, client, check
        self._stopped = threading.Event()
        self.healthy = threading.Event()
        self.ready = threading.Event()
        self.error: LaunchError | None = None
        #: Seconds that each question took.
        self.answered: dict[str, float] = {}

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def run(self) -> None:
        """Wait for health, then check."""
        while not self._stopped.wait(_PAUSE):
            if self._client.is_healthy(_HEALTH_TIMEOUT):
                self.healthy.set()
                break
        if self._stopped.is_set():
            return
        try:
            self._ask_all()
            self.ready.set()
        except LaunchError as exc:
            self.error = exc
        except FAILURES:
            # The connection broke: the engine died of it. Whoever watches the process says why.
            time.sleep(_DEATH_SECONDS)
            self.error = LaunchError(
                "the engine broke the connection of a worst-case request", hint="see its log"
            )

    def _ask_all(self) -> None:
        status, name = self._client.find_model(60.0)
        if name is None:
            raise LaunchError(
                f"the engine answered {status} when asked for its models", hint="see its log"
            )
        for question in questions(self._plan, name) if self.checks else ():
            began = time.monotonic()
            self._ask(question)
            self.answered[question.name] = round(time.monotonic() - began, 3)

    def _ask(self, question: Question) -> None:
        for body in question.bodies:
            status, answer = self._client.call(
                "POST", "/v1/chat/completions", body, timeout=_ANSWER_TIMEOUT
            )
            if status != http.client.OK:
                said = answer[:300].decode(errors="replace")
                raise LaunchError(
                    f"the engine answered {status} to {question.name}: {said}",
                    hint="see its log; --no-check skips this request",
                )
