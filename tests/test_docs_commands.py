"""Each command line of README, docs and help pages: parsed, and run."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

import turbofit
from tests.support.plans import few_presets
from turbofit.cli.command_group import COMMANDS, TURBOFIT
from turbofit.cli.main import main
from turbofit.cli.manual import MANUAL
from turbofit.core.errors import UsageError
from turbofit.core.synonyms import synonym

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md",
         *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))  # fmt: skip
_BLOCK = re.compile(r"^    turbofit (.+)$|^python -m turbofit (.+)$", re.MULTILINE)
_INLINE = re.compile(r"`turbofit\s([^`]+)`")
#: What a page writes for the reader's own words.
_CHOICES = re.compile(r"^[\w.]+(\|[\w.]+)+$")
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
#: Commands that start no engine, reach no server and need neither Ray nor a GPU.
RUN = {
    "plan", "predict", "which", "init", "export", "report", "compare", "models", "gpus",
    "completion", "help", "version",
}  # fmt: skip
#: What a line needs that this machine has not.
NEEDS = {
    "--cluster ray": "Ray", "node.json": "a node's snapshot", "--rehearse": "LMDeploy",
    "qwen2-vl-7b-mine": "a checkpoint that was merged",
}  # fmt: skip
#: tests/test_adding.py runs its lines, in a copy of the tree.
ELSEWHERE = ("docs/adding.md",)
#: The planned machine of a line that plans for the machine where it is typed.
ON = {"plan": "--on 4xrtx3090", "init": "--on 4xrtx3090"}
#: Files that a page speaks of and does not write.
GIVEN = {"docs/report.md": ("before.json", "after.json")}


class Shown(NamedTuple):
    """A command line without ``turbofit``. ``whole``: in a block of its own, as one types it."""

    page: str
    line: str
    whole: bool

    @property
    def argv(self) -> list[str]:
        """Its words, without a comment, a redirection and the commands behind a pipe."""
        return shlex.split(re.split(r" [>|] ", _one_line(self.line))[0], comments=True)

    def readings(self) -> Iterator[list[str]]:
        """Each reading of ``[OPTIONAL]`` words, left in, and of ``A|B``."""
        line = _one_line(self.line).replace("\\|", "|").replace("[OPTIONS]", "")
        line = line.replace("[", "").replace("]", "")
        words = shlex.split(re.split(r" [>&|] ?", line)[0], comments=True)
        yield from map(list, product(*(w.split("|") if _CHOICES.match(w) else [w] for w in words)))


def _one_line(line: str) -> str:
    return " ".join(line.split())


def profile() -> str:
    """The example of docs/environment.md, which its command lines read."""
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(example)["model"]
    return str(example)


def shown() -> list[Shown]:
    """All of them, page by page and in order; not those with ``…``, which leave something out.

    Also the examples of help pages.
    """
    found = [
        Shown(f"turbofit help {name}", example.removeprefix("turbofit "), whole=True)
        for name, manual in MANUAL.items()
        for example in manual.examples
    ]
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for pattern, whole in ((_BLOCK, True), (_INLINE, False)):
            lines = [next(filter(None, match.groups())) for match in pattern.finditer(text)]
            found += [Shown(page, line, whole) for line in lines if "…" not in line.split("  #")[0]]
    return [one for one in found if "──" not in one.line]


SHOWN = shown()


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


def runs(one: Shown) -> bool:
    return one.argv[0] in RUN and not any(need in one.line for need in NEEDS)


LINES = {page: [one for one in SHOWN if one.page == page and one.whole and runs(one)]
         for page in PAGES if page not in ELSEWHERE}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, lines in LINES.items() if lines])
def test_the_lines_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_presets(monkeypatch, ["h100"], ["internvl2-1b"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in GIVEN.get(page, ()):
        (tmp_path / name).write_text(turbofit.plan("internvl2-1b", on="1xl4").to_json())
    for one in LINES[page]:
        argv = one.argv
        if argv[0] in ON and "--on" not in argv and "--cluster" not in argv:
            argv += shlex.split(ON[argv[0]])
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main(argv) == 0, one.line
        assert said.getvalue().strip(), one.line
        _, to, name = one.line.split("  #")[0].partition(" > ")
        if to:
            (tmp_path / name.strip()).write_text(said.getvalue())


def test_no_page_and_nothing_that_can_run_is_left_out() -> None:
    whole = [one for one in SHOWN if one.whole]
    assert len(whole) > 80
    assert {"docs/batch.md", "docs/cluster.md", "docs/operations.md", "docs/bench.md",
            "README.md"} <= {one.page for one in whole}  # fmt: skip
    ran = Counter(one.argv[0] for lines in LINES.values() for one in lines)
    assert {"plan", "which", "init", "export", "report", "compare"} <= set(ran)
    assert ran["plan"] >= 8
