"""What a probe notes of the answers that an engine owes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.serving.engine.engine_client import Probe, Timing


def test_what_takes_a_question_and_does_not_answer_owes() -> None:
    """A port that is not open yet refuses at once."""
    clock, answers = (
        SimpleNamespace(now=0.0),
        iter([(0.0, False), (5.0, False), (0.0, False), (5.0, False), (0.1, True)]),
    )
    owed = list[bool]()

    class Client:
        def is_healthy(self, _: float) -> bool:
            owed.append(probe.owes)
            seconds, answer = next(answers)
            clock.now += seconds
            return answer

    client: Any = Client()
    probe = Probe(client, Timing(), None, serial=False, clock=lambda: clock.now)
    assert probe._comes_up()
    assert owed == [False, False, True, False, True]
    assert (probe.owes, probe.asked_at, probe.last_byte_at) == (False, 10.0, float("-inf"))


def test_a_question_to_a_ready_engine_is_no_word_of_it() -> None:
    """Else the minute's question would begin the silence of clients anew that wait longer."""
    clock, seen = SimpleNamespace(now=100.0), list[tuple[float, ...]]()

    class Client:
        def completes(self, patience: float) -> bool:
            seen.append((probe.owes, probe.asked_at, probe.last_byte_at))
            clock.now += patience if len(seen) < 3 else 1.0
            if len(seen) == 4:
                probe.stop()
            return len(seen) > 2

    client: Any = Client()
    probe = Probe(client, Timing(liveness=0.001), None, serial=False, clock=lambda: clock.now)
    probe._stopped.wait = lambda _: probe._stopped.is_set()  # type: ignore[method-assign]
    probe._look_after()
    never = float("-inf")
    assert seen == [*[(True, 100.0, never)] * 3, (True, 121.0, 121.0)]
    assert (probe.owes, probe.last_byte_at) == (False, 122.0)


@pytest.mark.parametrize(
    ("answers", "given_up"),
    [("fff", True), ("ff", False), ("ffaff", False), ("ffafff", True), ("lllll", False)],
)
def test_three_failed_questions_in_a_row_give_an_engine_up(answers: str, given_up: bool) -> None:
    """Those that fail at once (f); late ones (l) are judged as silence, an answer (a) is life."""
    clock, left = SimpleNamespace(now=100.0), list(answers)

    class Client:
        def completes(self, patience: float) -> bool:
            answer = left.pop(0)
            clock.now += patience if answer == "l" else 0.1
            if not left:
                probe.stop()
            return answer == "a"

    client: Any = Client()
    probe = Probe(client, Timing(), None, serial=False, clock=lambda: clock.now)
    probe._stopped.wait = lambda _: probe._stopped.is_set()  # type: ignore[method-assign]
    probe._look_after()
    assert probe.unanswered is given_up
    assert left == []
