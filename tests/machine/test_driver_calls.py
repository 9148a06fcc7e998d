"""A driver that does not answer, and who must not wait for it."""

from __future__ import annotations

import threading

import pytest

from tests.waiting import HANG
from turbofit.machine import nvml
from turbofit.machine.nvml import GpuLostError, ask_driver


def test_an_answer_is_passed_on() -> None:
    assert ask_driver(lambda: 7, 0) == 7


def test_what_a_question_raises_is_raised_to_who_asked() -> None:
    def question() -> int:
        raise GpuLostError("gone")

    with pytest.raises(GpuLostError, match="gone"):
        ask_driver(question, 0)


def test_a_driver_that_hangs_is_asked_no_more_until_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvml, "_SECONDS", 0.01)
    answers, asking = threading.Event(), []

    def hung() -> int:
        asking.append(threading.current_thread())
        answers.wait(HANG)
        return 7

    assert [ask_driver(hung, 0), ask_driver(hung, 0)] == [0, 0]
    assert len(asking) == 1
    answers.set()
    asking[0].join(HANG)
    monkeypatch.setattr(nvml, "_SECONDS", HANG)
    assert ask_driver(hung, 0) == 7
