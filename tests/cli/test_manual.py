from __future__ import annotations

import pytest

from turbofit.cli.command_group import COMMANDS
from turbofit.cli.main import main
from turbofit.cli.manual import EXIT_CODES, MANUAL, manual_text


def test_every_command_has_one() -> None:
    assert set(MANUAL) == set(COMMANDS)


@pytest.mark.parametrize("name", list(MANUAL))
def test_it_is_below_the_options_and_not_too_wide(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    page = capsys.readouterr().out
    assert main(["help", name]) == 0
    assert capsys.readouterr().out == page
    assert f"turbofit {name}" in page
    assert page.rstrip().endswith(manual_text(name).rstrip())
    for word in ("examples:", "exit codes: 0 done; 1 a bug", "touches: "):
        assert word in page
    assert max(map(len, manual_text(name).splitlines())) <= 100


def test_exit_codes_are_known() -> None:
    assert all(code in EXIT_CODES for manual in MANUAL.values() for code in manual.exits)
    assert manual_text("nothing") == ""
