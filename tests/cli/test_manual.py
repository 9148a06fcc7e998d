from __future__ import annotations

import shlex

import click
import pytest

from turbofit.cli.command_group import COMMANDS, TURBOFIT
from turbofit.cli.manual import EXIT_CODES, MANUAL, manual_text


def test_every_command_has_one() -> None:
    assert set(MANUAL) == set(COMMANDS)


@pytest.mark.parametrize("name", list(MANUAL))
def test_it_is_below_the_options_and_not_too_wide(name: str) -> None:
    command = TURBOFIT.get_command(click.Context(TURBOFIT), name)
    assert command is not None
    text = command.get_help(click.Context(command, info_name=name, terminal_width=96))
    assert text.endswith(manual_text(name).rstrip())
    for word in ("examples:", "exit codes: 0 done; 1 a bug", "touches: "):
        assert word in text
    assert max(map(len, manual_text(name).splitlines())) <= 100


@pytest.mark.parametrize(("name", "line"), [(n, e) for n, m in MANUAL.items() for e in m.examples])
def test_every_example_is_understood(name: str, line: str) -> None:
    program, typed, *words = shlex.split(line.partition(" > ")[0])
    assert (program, typed) == ("turbofit", name)
    command = TURBOFIT.get_command(click.Context(TURBOFIT), name)
    assert command is not None
    command.make_context(name, words).close()


def test_exit_codes_are_known() -> None:
    assert all(code in EXIT_CODES for manual in MANUAL.values() for code in manual.exits)
    assert manual_text("nothing") == ""
