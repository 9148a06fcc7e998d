"""A signal before and while a command's body runs, and the exit code then."""

from __future__ import annotations

import os
import signal

import pytest

from turbofit.cli.terminal.output import exit_code, run_until_signal
from turbofit.launch.serve.supervisor import StopSignal


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_before_anything_runs_ends_the_body(number: signal.Signals, code: int) -> None:
    after: list[str] = []
    before = signal.getsignal(number)

    def body(_stop: StopSignal) -> None:
        signal.raise_signal(number)
        after.append("still there")

    ended = run_until_signal(body)
    assert (ended, exit_code(ended), after) == (number, code, [])
    assert signal.getsignal(number) is before


def test_a_body_that_stops_in_order_says_what_ended_it() -> None:
    def body(stop: StopSignal) -> signal.Signals | None:
        stop.abrupt = False
        os.kill(os.getpid(), signal.SIGINT)
        return stop.signal

    assert exit_code(run_until_signal(body)) == 130


def test_a_body_that_comes_to_its_end_is_no_interruption() -> None:
    assert exit_code(run_until_signal(lambda _stop: None)) == 0
