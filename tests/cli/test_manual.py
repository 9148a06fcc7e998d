from __future__ import annotations

import importlib
import shlex

import pytest

from turbofit.cli.main import COMMANDS
from turbofit.cli.manual import EXIT_CODES, MANUAL, manual_text
from turbofit.cli.parser import Parser


def test_every_command_has_one() -> None:
    assert set(MANUAL) == set(COMMANDS)


@pytest.mark.parametrize("name", list(MANUAL))
def test_it_is_below_the_options_and_not_too_wide(name: str) -> None:
    parser = Parser(prog=f"turbofit {name}")
    importlib.import_module(f"turbofit.cli.{name}").add_arguments(parser)
    text = parser.format_help()
    assert text.endswith(manual_text(name))
    for word in ("examples:", "exit codes: 0 done; 1 a bug", "touches: "):
        assert word in text
    assert max(map(len, manual_text(name).splitlines())) <= 100


@pytest.mark.parametrize(("name", "line"), [(n, e) for n, m in MANUAL.items() for e in m.examples])
def test_every_example_is_understood(name: str, line: str) -> None:
    module = importlib.import_module(f"turbofit.cli.{name}")
    parser = Parser(prog=f"turbofit {name}")
    module.add_arguments(parser)
    program, command, *words = shlex.split(line.partition(" > ")[0])
    assert (program, command) == ("turbofit", name)
    own = words[: words.index("--")] if "--" in words else words
    assert ("--" in words) <= getattr(module, "TAKES_REST", False)
    parser.parse_args(own)


def test_exit_codes_are_known() -> None:
    assert all(code in EXIT_CODES for manual in MANUAL.values() for code in manual.exits)
    assert manual_text("nothing") == ""
