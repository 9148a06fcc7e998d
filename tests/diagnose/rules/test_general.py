"""No row answers another program's words, or needs a time that grows faster than its line."""

from __future__ import annotations

import re
from pathlib import Path
from re import _parser  # type: ignore[attr-defined] - the only way to see what a pattern needs
from typing import Any, Final

import pytest

from tests.diagnose.conftest import explain
from turbofit.diagnose.rules.causes import causes, fact_lines, pattern_of

HERE: Final = Path(__file__).parent
#: What is said where nothing failed, and nothing is known.
QUIET: Final = ("unknown", "healthy", "memory_table", "peer_warning")
#: Letters and digits that each line of a row has: about five words. Below this rows matched 47 of
#: the lines of `foreign.txt`, from here on none.
SPECIFIC: Final = 24


def _logs(name: str) -> dict[str, list[str]]:
    """Logs of a file by their headings, written for this test: made-up details."""
    logs: dict[str, list[str]] = {}
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("=== "):
            heading = line[4:]
            logs[heading] = []
        else:
            logs[heading].append(line)
    return logs


FOREIGN: Final = _logs("foreign.txt")
HEALTHY: Final = _logs("healthy.txt")


@pytest.mark.parametrize("log", [*FOREIGN.values(), *HEALTHY.values()], ids=[*FOREIGN, *HEALTHY])
def test_logs_of_other_programs_and_healthy_ones_have_no_cause(log: list[str]) -> None:
    found = explain("\n".join(log))
    assert found.kind in QUIET, found.what
    assert not found.also


@pytest.mark.parametrize("log", FOREIGN.values(), ids=FOREIGN)
def test_a_line_of_another_program_has_no_cause(log: list[str]) -> None:
    """An exception of Python that stands alone is a person's question, whoever raised it."""
    for line in log:
        found = explain(line)
        alone = re.match(r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception): ", line)
        assert alone or found.kind in QUIET, (line, found.what)


def _literals(pattern: Any) -> int:
    """Letters and digits that each match has at least."""
    count = 0
    for operation, value in pattern:
        name = str(operation)
        if name == "LITERAL":
            count += chr(value).isalnum()
        elif name == "BRANCH":
            count += min(_literals(way) for way in value[1])
        elif name.endswith("REPEAT"):
            count += value[0] * _literals(value[2])
        elif name in ("SUBPATTERN", "ASSERT"):
            count += _literals(value[-1])
    return count


def test_a_row_names_its_program_or_has_a_message_of_its_own() -> None:
    assert _literals(_parser.parse(r"(?:ab|c)(?P<x>de)+\d f?")) == 3
    for row in causes():
        own = _literals(_parser.parse(row.pattern)) >= SPECIFIC
        assert own or row.common or row.when, row.pattern


ROOT: Final = "ValueError: there is no such plane\n"
PROGRESS: Final = "INFO 03-02 11:20:01 [core.py:58] step 1 of vLLM\nLoading:  50%|#####     | 2/4\n"
KNOWN: Final = "ModuleNotFoundError: No module named 'timm'\n"


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        # What a run went on after is not what ended it, and a child's error right before is.
        (f"{KNOWN}{PROGRESS}{ROOT}", "unknown"),
        (f"{KNOWN}{ROOT}", "missing_package"),
        (f"{KNOWN}{PROGRESS}", "missing_package"),
        # An exception of a destructor ends nothing.
        (
            f"{ROOT}Exception ignored in: <function LLM.__del__ at 0x7f>\nTraceback (most recent"
            " call last):\nModuleNotFoundError: No module named 'vllm._C'\n",
            "unknown",
        ),
        # A warning alone tells of the machine at most.
        (
            "WARNING 03-02 [x.py:1] vLLM: ModuleNotFoundError: No module named 'vllm._C'\n",
            "unknown",
        ),
        ("INFO: No module named 'vllm._C', falling back to torch\n", "unknown"),
    ],
)
def test_the_answer_is_about_what_ended_the_run(log: str, kind: str) -> None:
    found = explain(log)
    assert found.kind == kind
    assert kind != "unknown" or found.evidence


def _starts(pattern: Any) -> bool:
    """Whether a match may begin with a repeat that has no bound: each place of a line is tried."""
    for operation, value in pattern:
        name = str(operation)
        if name == "AT":
            return False
        if name.startswith("ASSERT"):
            continue
        if name.endswith("REPEAT"):
            least, most, repeated = value
            if most == _parser.MAXREPEAT or _starts(repeated):
                return True
            if least == 0:
                continue
        elif name == "BRANCH":
            return any(_starts(way) for way in value[1])
        elif name == "SUBPATTERN":
            return _starts(value[-1])
        return False
    return False


def _repeats(pattern: Any) -> int:
    """Repeats without a bound that follow each other in one way through a pattern."""
    count = 0
    for operation, value in pattern:
        name = str(operation)
        if name == "BRANCH":
            count += max(_repeats(way) for way in value[1])
        elif name.endswith("REPEAT"):
            count += (value[1] == _parser.MAXREPEAT) + _repeats(value[2])
        elif name == "SUBPATTERN":
            count += _repeats(value[-1])
    return count


def test_no_pattern_needs_the_square_of_a_line() -> None:
    """By its form: a name has a bound, a way through has few other repeats, and a start a word."""
    assert _starts(_parser.parse(r"(?:a|\S*b)"))
    assert not _starts(_parser.parse(r"^.*b|a.*"))
    assert _repeats(_parser.parse(r"a.*(?:b.*c.*|d.{0,9})")) == 3
    for row in (*causes(), *fact_lines()):
        pattern = _parser.parse(pattern_of(row.pattern).pattern)
        assert not _starts(pattern), row.pattern
        assert _repeats(pattern) <= 4, row.pattern
