"""The command lines of README and docs that plan, report or list: each is run, page by page."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections import Counter
from pathlib import Path

import pytest

import turbofit
from tests.docs_commands import PAGES, Shown, shown
from tests.support.plans import few_presets
from turbofit.cli.main import main

pytestmark = pytest.mark.slow

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


def runs(one: Shown) -> bool:
    return one.argv[0] in RUN and not any(need in one.line for need in NEEDS)


LINES = {page: [one for one in shown() if one.page == page and one.whole and runs(one)]
         for page in PAGES if page not in ELSEWHERE}  # fmt: skip


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


def test_nothing_that_can_run_is_left_out() -> None:
    ran = Counter(one.argv[0] for lines in LINES.values() for one in lines)
    assert {"plan", "which", "init", "export", "report", "compare"} <= set(ran)
    assert ran["plan"] >= 8
