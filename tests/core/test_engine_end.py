"""Exit codes of engines in words."""

from __future__ import annotations

import pytest

from turbofit.core.engine_end import exit_words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "no exit: its server lives and answers no request"),
        (1, "exit code 1"),
        (-9, "signal SIGKILL"),
        (137, "signal SIGKILL"),
        (-70, "signal 70"),
        (193, "exit code 193"),
        (255, "exit code 255"),
    ],
)
def test_a_signal_is_named_whether_python_or_a_shell_tells_of_it(code, words) -> None:
    assert exit_words(code) == words
