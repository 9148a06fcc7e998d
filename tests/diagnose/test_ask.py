"""What is asked for, and the first step, if a log does not prove its cause."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain

OLD = "lmdeploy==0.4.1\n"
TITLE = "# [Bug] answers are garbled\n\n"
CUT = 'Traceback (most recent call last):\n  File "/v/lmdeploy/x.py", line 7, in g\n    moon()\n'
RAISED = f"{CUT}MoonError: no tide\n"


@pytest.mark.parametrize(
    ("log", "first"),
    [
        (TITLE, "the command, what was asked, what came and what was expected"),
        (f"{TITLE}{OLD}", "whether a newer LMDeploy does the same"),
        (f"{TITLE}{OLD}It is fixed in 0.5.0.", "what the text itself says: It is fixed in 0.5.0."),
        (f"{TITLE}{CUT}", "the lines after the last one here"),
        (f"{TITLE}INFO 1 moon\nthat is all", "the log whole, from the command"),
        (RAISED, "give the log from its start"),
        (f"{OLD}{RAISED}", "whether a newer LMDeploy does the same"),
        ("# [Bug] '.bf16' requires .target sm_80 or higher\n\nwhy?", "use float16"),
    ],
)
def test_the_first_step_is_what_the_text_lacks(log: str, first: str) -> None:
    """Its end, a log, a line that tells of an error; else what others tried, or what to send."""
    found = explain(log)
    assert not found.known
    assert found.first.startswith(first)
    steps = (*found.send, *(found.others.tried if found.others else ()))
    assert found.first in steps or found.first.removeprefix("what the text itself says: ") in log


def test_a_proven_cause_begins_with_its_change_and_a_healthy_log_with_nothing() -> None:
    died = explain("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert died.first == next(iter((*died.send, *died.changes)))
    assert not explain("INFO: Uvicorn running on http://0.0.0.0:23333\n").first
