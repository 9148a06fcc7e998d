"""What a log tells of each run of an engine that it has."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain
from tests.diagnose.test_explain import BUDGET, COMMAND, FATAL, TM, WARMING


def _run(*news: str) -> str:
    """A start of an engine at LMDeploy's INFO, at the default's times."""
    return "".join((COMMAND, "Loading:   0%|          | 0/24 [00:00<?, ?it/s]\n", *news))


UP = f"{WARMING}{TM}[turbomind.cc:492] Warm-up finished in 0.01 seconds.\n"
SERVING = "INFO:     Uvicorn running on http://0.0.0.0:23333 (Press CTRL+C to quit)\n"


@pytest.mark.parametrize(
    ("runs", "phase"),
    [
        ([(BUDGET, UP, SERVING), (FATAL,)], "weights"),
        ([(BUDGET, UP, SERVING), (BUDGET, FATAL)], "cache"),
        ([(BUDGET, WARMING, FATAL), (BUDGET, UP, SERVING)], "warm-up"),
        ([(BUDGET, UP, SERVING), (BUDGET, UP, SERVING, FATAL)], "text"),
        ([(BUDGET, UP, SERVING)] * 40 + [(FATAL,)] + [(BUDGET, UP, SERVING)] * 3, "weights"),
    ],
)
def test_the_phase_is_that_of_the_run_that_died(runs: list[tuple[str, ...]], phase: str) -> None:
    """An engine that its supervisor started again was said to die where the first run had been."""
    text = "# 2x RTX 3090\n" + "".join(_run(*news) for news in runs)
    found = explain(text)
    assert (found.kind, found.phase) == ("out_of_memory", phase)
    assert found.read.machine == "2xrtx3090"
    assert found.read.lines == text.count("\n")


def test_a_restart_without_its_command_is_told_by_what_it_prints() -> None:
    loading = "Loading:   0%|          | 0/24 [00:00<?, ?it/s]"
    died = explain(_run(BUDGET, UP, SERVING) + loading + FATAL)
    assert died.phase == "weights"
    assert "weights" in died.what
