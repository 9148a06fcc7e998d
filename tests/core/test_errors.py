"""Options that an error's lines mark, spelled as they are typed and as keywords."""

from __future__ import annotations

import sys
import traceback

import pytest

import turbofit
from turbofit.core.errors import NoGpuError, UsageError


def both(text: str) -> tuple[str, str]:
    """A text in the words of a shell, and of Python."""
    error = UsageError("wrong", hint=text)
    typed = error.hint
    error.name_keywords()
    return typed, error.hint


@pytest.mark.parametrize(
    ("text", "typed", "keyword"),
    [
        ("leave `--max-pixels` out", "leave --max-pixels out", "leave max_pixels out"),
        ("`--tp 4` at most", "--tp 4 at most", "tp=4 at most"),
        ("give `--on 2xl4`", "give --on 2xl4", 'give on="2xl4"'),
        ("`--on 4090`", "--on 4090", 'on="4090"'),
        ("give `--on SPEC`", "give --on SPEC", "give on=SPEC"),
        ("`--async 1`", "--async 1", "async_=1"),
        ("turbofit plan M --on SPEC", "turbofit plan M --on SPEC", "turbofit plan M --on SPEC"),
        ("a model from `turbofit models`",) * 3,
        ("what stands in --on, with `--on`", "what stands in --on, with --on",
         "what stands in --on, with on"),
    ],
)  # fmt: skip
def test_what_is_marked_is_spelled_by_the_door_and_nothing_else_changes(
    text: str, typed: str, keyword: str
) -> None:
    assert both(text) == (typed, keyword)


def test_the_options_of_an_error_are_those_it_was_given_then_those_it_marks() -> None:
    error = UsageError("`--tp 4` does not go", hint="leave `--replicas` or `--tp`", options=["on"])
    assert error.options == ("on", "tp", "replicas")
    assert UsageError("no option", hint="see --help").options == ()


def test_a_hint_of_python_holds_the_command_as_it_is_typed() -> None:
    """Its ``--on`` was once spelled ``on`` inside a command, which did not run then."""
    with pytest.raises(UsageError) as caught:
        turbofit.which("internvl2-8b", on="4xrtx3090")
    assert caught.value.message == "which MODEL looks for machines, and on names one"
    assert "turbofit plan MODEL --on SPEC" in caught.value.hint


def test_the_note_of_a_traceback_is_spelled_once() -> None:
    error = NoGpuError("NVML sees no GPU", hint="describe a machine with `--on SPEC`")
    error.name_keywords()
    lines = "".join(traceback.format_exception(error))
    assert lines.count("hint:") == int(sys.version_info >= (3, 11))
    assert "--on" not in lines
