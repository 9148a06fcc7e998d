"""What reaches a terminal or a pipe, and an answer that Ctrl-C ends."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from collections.abc import Mapping

import pytest

from tests.cli.screen import Terminal, screen_of
from turbofit.cli.main import main
from turbofit.cli.terminal import screen
from turbofit.cli.terminal.output import exit_code, run_until_signal, verbose_log
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.signals import StopSignal

PLAN = ["plan", "internvl2-8b", "--on", "1xrtx3090", "--json"]
Out = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("option", "said"),
    [([], set()), (["-v"], {"INFO"}), (["--verbose"], {"INFO"}), (["-vv"], {"INFO"})],
)
def test_the_log_goes_to_stderr_and_json_stays_json(option: list[str], said, capsys) -> None:
    assert main([*PLAN, *option]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits"]
    lines = captured.err.splitlines()
    assert {line.split()[2] for line in lines} == said
    search = "turbomind on 1xrtx3090: 4 shapes looked at, 4 fit; the best: tp 1 x 1"
    assert any(search in line for line in lines) == bool(said)
    assert not logging.getLogger("turbofit").handlers


def test_an_answer_is_as_wide_as_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(PLAN[:-1]) == 0
    lines = screen_of(terminal.getvalue())
    assert {line.split()[0] for line in lines if len(line) > 50} == {"turbofit"}  # to be copied


def test_errors_keep_their_two_lines_below_the_log(capsys: Out) -> None:
    assert main(["machine", "--on", "2xrtx3090", "--gpus", "7", "-v"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "error", "hint",
    ]  # fmt: skip


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_names_of_others_cannot_steer_the_terminal(level: str, capsys: Out, caplog) -> None:
    caplog.set_level(logging.ERROR, "turbofit")
    with verbose_log(2):
        getattr(LazyLogger("turbofit.x"), level.lower())("read %s", "a\x1b[2J\nb")
    assert capsys.readouterr().err.endswith(f"{level} turbofit.x: read a?[2J?b\n")
    assert logging.getLogger("turbofit").level == logging.ERROR


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
    assert exit_code(run_until_signal(lambda _stop: None)) == 0


@pytest.mark.parametrize(
    ("environ", "redraws", "colour"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_what_a_terminal_takes(environ: Mapping[str, str], redraws: bool, colour: bool) -> None:
    assert screen.redraws(Terminal(), environ) is redraws
    assert screen.takes_colour(environ) is colour
    assert not screen.redraws(io.StringIO(), environ)
