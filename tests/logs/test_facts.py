"""What a log reports of its runs, and what a later line rules out."""

from __future__ import annotations

from itertools import starmap

import pytest

from tests.logs.conftest import explain, message
from tests.logs.test_explain import UP
from turbofit.logs.facts import read_runs
from turbofit.logs.log_reader import LogLine


def test_what_every_run_says_of_the_machine_is_not_multiplied_by_the_runs() -> None:
    """A log of 3 MB took 1 GB: each of 3000 runs had the lines of all of them."""
    run = [
        "max_context_token_num",
        "max_block_count = 9",
        "Device 0 peer access Device 1 is not ",
    ]
    run[2] += "available"
    found = read_runs(starmap(LogLine, enumerate(run * 200, 1)))
    assert sum(len(one.marks) for one in found) < 200 * 40
    assert found[-1].subject.lines == 600


ANSWERS = """\
INFO:     client - "POST /v1/chat/completions HTTP/1.1" 200 OK
[2026-11-27 21:44:15 DP0] Avg thr (in/out): 9319.6 / 86.3 tokens/s, Server \
(succeeded/failed/routed/waiting): 36 / FAILED / 1 / 0, Engine (running/waiting): 1 / 0, KV cache: \
7.0%,
INFO:     client - "POST /v1/chat/completions HTTP/1.1" 200 OK
"""


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("failed", [0, 30])
def test_a_count_of_requests_is_no_error(failed: int, numbered: bool) -> None:
    """A line that LMDeploy prints every ten seconds; a log may begin later than its engine."""
    log = ANSWERS.replace("FAILED", str(failed))
    if numbered:  # as `grep -n` prints it
        log = "".join(f"{n}:{row}\n" for n, row in enumerate(log.splitlines(), 58))
    found = explain(log)
    assert (found.kind, found.phase) == ("healthy", "none")
    broken = explain(f"{log}ERROR: the disk went away\n")
    assert broken.kind == "unknown"
    assert "the disk went away" in broken.what


def test_words_before_another_exception_are_no_event() -> None:
    words = "the model `x` does not exist here, and the default chat template is no longer allowed"
    unknown = "Traceback (most recent call last):\nZeroDivisionError: division by zero\n"
    assert explain(f"{words}\n{unknown}").kind == "unknown"
    assert message(explain(words)) == "no_chat_template"


DRIVER = (
    "/venv/torch/cuda/__init__.py:129: UserWarning: CUDA initialization: The NVIDIA driver on your"
    " system is too old (found version 11040).\n"
)


@pytest.mark.parametrize(
    ("kind", "log"),
    [
        ("unknown", f"{DRIVER}ValueError: another thing\n"),
        ("driver_too_old", f"{DRIVER}RuntimeError: No CUDA GPUs are available\n"),
        (
            "unknown",
            "2025-03-19 - lmdeploy - WARNING - Fallback to pytorch engine because `/m` not"
            " supported by turbomind engine.\nRuntimeError: another thing\n",
        ),
        (
            "request_rejected",
            'lmdeploy\nsession 3 finished, reason "error"\n'
            "ValueError: Input length (9000) must be smaller than the model context length (8192)",
        ),
        ("interrupted", "KeyboardInterrupt\nAborted (core dumped)\n"),
    ],
)
def test_what_a_run_outlived_or_a_client_wrote_is_no_cause(kind: str, log: str) -> None:
    assert explain(log).kind == kind


def test_a_warning_of_python_of_two_lines_is_no_cause() -> None:
    found = explain(
        "/w/lmdeploy/version.py:8: RuntimeWarning: Failed to read commit hash:\nNo module named"
        " 'lmdeploy.commit_id'\nImportError: cannot import name '_C' from 'lmdeploy' (unknown"
        " location)\n"
    )
    assert (message(found), found.also) == ("missing_extension", ())
    assert [one.line for one in found.evidence] == [3]
    quoted = "/x.py:3: UserWarning: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert explain(f"{quoted}\nZeroDivisionError: division by zero\n").kind == "unknown"


@pytest.mark.parametrize(
    "line",
    [
        "2025-06-01 10:00:05,000 INFO retry ok, 0 requests failed",
        "2025-06-01 10:00:00 - lmdeploy - WARNING - retry: connection refused, trying again",
        "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  550.54.14",
    ],
)
def test_a_line_that_a_program_outlived_is_not_the_last_error(line: str) -> None:
    assert not explain(f"{line}\n").evidence


@pytest.mark.parametrize(
    "line", ["Failed requests: 0", "Successful requests: 100, failed: 0", "0 errors", "errors=0"]
)
def test_a_count_of_no_failures_is_no_error(line: str) -> None:
    assert explain(f"{UP}{line}\n").kind == "healthy"
    assert explain(f"{UP}{line.replace('0', '7')}\n").kind != "healthy" or "7" not in line
