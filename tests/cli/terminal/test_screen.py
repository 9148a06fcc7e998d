"""Work longer than a second is shown: drawn on a terminal, lines elsewhere, nothing if quiet."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from typing import Final

import pytest

from tests.cli.screen import Screen, screen_of
from turbofit.cli.terminal import output, screen
from turbofit.cli.terminal.screen import ProgressDisplay
from turbofit.core.process.progress import Step

#: `turbofit` whose planning takes until a line comes on stdin; progress is shown from the start.
SLOW: Final = """
import sys
from turbofit import api
from turbofit.cli.terminal import screen
from turbofit.cli.main import main
from turbofit.cli.terminal.output import say
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import Step, tell
screen._PATIENCE = screen._SELDOM = 0.0
plan = api.plan
def slow(request, **options):
    for word in iter(sys.stdin.readline, "go\\n"):
        if word == "weights\\n":
            tell(Step("loading weights", 3 << 30, 15 << 30, "bytes"))
        elif word == "say\\n":
            say("phase: weights")
        else:
            raise UsageError("it is wrong", hint="mend it")
    return plan(request, **options)
api.plan = slow
sys.exit(main(sys.argv[1:]))
"""
PLAN: Final = ["plan", "internvl2-8b", "--on", "1xrtx3090"]
ESCAPE: Final = "\x1b"


def drawn(text: str, what: str) -> bool:
    """Whether a line with these words is on the screen now."""
    return any(what in line for line in screen_of(text))


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_shows_it_and_then_the_answer_alone(columns: int) -> None:
    screen = Screen(SLOW, PLAN, columns=columns)
    screen.until(lambda text: drawn(text, "planning, "))
    screen.say("weights")
    screen.until(lambda text: drawn(text, "3.0 GiB of 15.0 GiB"))
    (line,) = screen_of(screen.text)
    assert line.startswith("[#") is (columns == 80)
    assert len(line) < columns
    screen.say("go")
    assert screen.end() == 0
    shown = screen_of(screen.text)
    assert "1xrtx3090" in "".join(shown[:2])
    assert not any("planning" in one or "loading" in one for one in shown)


@pytest.mark.parametrize("how", ["Ctrl-C", "error"])
def test_what_is_said_meanwhile_stands_above_it_and_nothing_of_it_is_left(how: str) -> None:
    screen = Screen(SLOW, PLAN)
    screen.until(lambda text: drawn(text, "planning, "))
    screen.say("say")
    screen.until(lambda text: drawn(text, "phase: weights") and drawn(text, "planning, "))
    first, second = screen_of(screen.text)
    assert first == "phase: weights"
    assert "planning, " in second
    if how == "Ctrl-C":
        screen.process.send_signal(signal.SIGINT)
        assert screen.end() == 130
        assert screen_of(screen.text) == ["phase: weights"]
    else:
        screen.say("fail")
        assert screen.end() == 2
        assert screen_of(screen.text)[1:] == ["error: it is wrong", "hint: mend it"]


@pytest.mark.parametrize(("words", "said"), [([], True), (["--quiet"], False), (["--json"], False)])
def test_a_pipe_gets_lines_without_escapes(words: list[str], said: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *PLAN, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        first = process.stderr.readline() if said else ""
        out, err = process.communicate("go\n")
    assert process.returncode == 0
    assert ESCAPE not in out + err
    assert first.startswith("planning") is said
    assert said or not err
    assert out


class Clock:
    """Stands at the time that a test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> ProgressDisplay:
    """One whose thread never looks: the test does."""
    monkeypatch.setattr(ProgressDisplay, "_run", lambda self: None)
    monkeypatch.setattr(screen, "_PATIENCE", 1.0)
    return ProgressDisplay(io.StringIO(), in_place=False, clock=Clock())


def written(display: ProgressDisplay, now: float) -> str:
    """What a look at this time writes."""
    display._clock.now = now  # type: ignore[attr-defined]
    display._stream = stream = io.StringIO()
    display.look()
    return stream.getvalue()


def test_the_first_second_is_silent_and_lines_are_seldom(display: ProgressDisplay) -> None:
    display.hear(Step("planning"))
    assert (written(display, 0.9), written(display, 1.0)) == ("", "planning, 1 s\n")
    assert (written(display, 10.9), written(display, 75.0)) == ("", "planning, 1 min 15 s\n")
    display.hear(Step("loading weights", 1, 4))
    assert written(display, 75.2) == "loading weights: 1 of 4 …\n"
    display.hear(Step("loading weights", 2, 4))
    assert written(display, 76.0) == ""
    assert written(display, 85.5) == "loading weights: 2 of 4, 10 s, 21 s left\n"
    display.hear(Step("measuring", 99, 30, "s", "7 answered"))
    assert written(display, 86.0) == "measuring: 30 of 30 s, 7 answered …\n"
    display.hear(None)
    assert written(display, 200.0) == ""


def test_warnings_are_said_to_the_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress(quiet=True, as_json=False):
        output.say("phase: weights")
        output.say("engine 1: warning: the disk is full")
    output.say("phase: ready")
    assert capsys.readouterr().err == "engine 1: warning: the disk is full\nphase: ready\n"
