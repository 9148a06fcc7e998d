"""Each command line of README and docs is one that turbofit takes: click parses it."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from tests.docs_commands import PAGES, ROOT, Shown, profile, shown
from turbofit.cli.command_group import COMMANDS, TURBOFIT
from turbofit.core.errors import UsageError
from turbofit.core.synonyms import synonym

SHOWN = shown()
#: An inline mention names a command or an option; it need not be whole.
_UNFINISHED = re.compile(r"is missing|needs a value|requires an argument")
#: Options of other programs, which pages name in back ticks.
_OF_OTHERS = {
    "LMDeploy": {
        "--nnodes", "--node-rank", "--dist-init-addr", "--trust-remote-code", "--reasoning-parser",
        "--logprobs-mode",
    },
    "turbofit-fallback": {"--max-images"},
    "scripts/check, pytest": {"--quick", "--all", "--hypothesis-profile"},
    "scripts/citations.py, scripts/new-lmdeploy": {"--renew", "--source", "--write"},
}  # fmt: skip


def problem_of(argv: list[str]) -> str:
    """What click says of a command line; empty where it takes it."""
    name, *rest = argv
    command = TURBOFIT.get_command(click.Context(TURBOFIT), name)
    assert command is not None, f"turbofit {name}"
    try:
        command.make_context(name, rest).close()
    except UsageError as exc:
        return exc.message
    return ""


@pytest.mark.parametrize("one", SHOWN, ids=lambda one: f"{one.page}: {one.line[:60]}")
def test_a_command_line_parses(one: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "turbofit.yaml").write_text(profile(), encoding="utf-8")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "batch").write_text("a key of sixteen letters")
    monkeypatch.setenv("CHAT_KEY", "another key of many letters")
    monkeypatch.chdir(tmp_path)
    for argv in one.readings():
        assert argv[0] in COMMANDS, one.page
        problem = problem_of(argv)
        assert not problem or (not one.whole and _UNFINISHED.search(problem)), problem


def test_every_page_of_commands_is_seen() -> None:
    whole = [one for one in SHOWN if one.whole]
    assert len(whole) > 80
    assert {"docs/batch.md", "docs/cluster.md", "docs/operations.md", "docs/bench.md",
            "README.md"} <= {one.page for one in whole}  # fmt: skip


def options() -> set[str]:
    found = set()
    for name in COMMANDS:
        command = TURBOFIT.get_command(click.Context(TURBOFIT), name)
        assert command is not None
        for param in command.params:
            found |= {*param.opts, *param.secondary_opts}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_an_option_in_back_ticks_exists(page: str) -> None:
    known = options()
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`(--[a-z][\w-]+)[^`]*`", text)
    foreign = {one for one in named if one not in known and synonym(one) is None}
    assert foreign <= set().union(*_OF_OTHERS.values())
