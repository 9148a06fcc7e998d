"""Command lines of README, docs, help pages, the skill and the notebook: parsed, and run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import click
import pynvml
import pytest
import yaml

from tests.support.plans import few_presets
from turbofit.cli.main import TURBOFIT, main
from turbofit.cli.manual import COMMANDS, MANUAL
from turbofit.cli.usage_errors import options_by_command
from turbofit.core.errors import UsageError
from turbofit.core.messages import neighbours
from turbofit.serving.passthrough import engine_options

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", ".github/CONTRIBUTING.md",
         *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))  # fmt: skip
_BLOCK = re.compile(r"^    turbofit (.+)$|^python -m turbofit (.+)$", re.MULTILINE)
_INLINE = re.compile(r"`turbofit\s([^`]+)`")
#: A command, and the rest of its sentence with what that quotes.
_QUOTED = re.compile(r'`((?:plan|predict) [^`]+)`((?:[^`".。]|"[^"]*")*)')
#: What a page writes for the reader's own words.
_CHOICES = re.compile(r"^[\w.]+(\|[\w.]+)+$")
#: An inline mention names a command or an option; it need not be whole.
_UNFINISHED = re.compile(r"is missing|needs a value|requires an argument")
#: Options of other programs, which pages name in back ticks.
_OF_OTHERS = {
    "LMDeploy": set(engine_options()),
    "nvidia-smi": {"--query-gpu"},
    "VLMEvalKit": {"--api-nproc"},
    "bench.simulation": {"--seed"},
    "scripts/check, pytest": {"--quick", "--all", "--hypothesis-profile"},
    "scripts/citations.py, scripts/new-lmdeploy": {"--renew", "--source", "--write"},
}  # fmt: skip
#: Commands that start no engine, reach no server and need neither Ray nor a GPU.
RUN = {
    "plan", "predict", "which", "export", "report", "models", "gpus",
    "completion",
}  # fmt: skip
#: What a line needs that this machine has not.
NEEDS = {
    "--cluster ray": "Ray", "node.json": "a node's snapshot", "--rehearse": "LMDeploy",
    "qwen2-vl-7b-mine": "a checkpoint that was merged", "--share": "a run on a real card",
}  # fmt: skip
#: tests/test_adding.py runs its lines, in a copy of the tree.
ELSEWHERE = ("docs/adding.md",)
#: The planned machine of a line that plans for the machine where it is typed.
ON = {"plan": "--on 4xrtx3090"}


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
        Shown(f"turbofit {name} --help", example.removeprefix("turbofit "), whole=True)
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
    if name in ("--help", "--version"):
        return ""
    command = TURBOFIT.get_command(click.Context(TURBOFIT), name)
    if name not in COMMANDS or command is None:
        return f"there is no turbofit {name}"
    try:
        command.make_context(name, rest, parent=click.Context(TURBOFIT)).close()
    except UsageError as exc:
        return exc.message
    return ""


@pytest.mark.parametrize("page", sorted({one.page.partition(" ")[0] for one in SHOWN}))
def test_command_lines_parse(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "turbofit.yaml").write_text(profile(), encoding="utf-8")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "batch").write_text("a key of sixteen letters")
    monkeypatch.setenv("CHAT_KEY", "another key of many letters")
    monkeypatch.chdir(tmp_path)
    lines = [(one, argv) for one in SHOWN if one.page.startswith(page) for argv in one.readings()]
    problems = [(one, problem_of(argv)) for one, argv in lines]
    assert [
        (one.page, one.line, problem)
        for one, problem in problems
        if problem and (one.whole or not _UNFINISHED.search(problem))
    ] == []


def test_an_option_in_back_ticks_exists() -> None:
    ctx = click.Context(TURBOFIT)
    known = set().union(*_OF_OTHERS.values())
    table = neighbours()
    rows = (*table["programs"].values(), table["options"]["every"])
    theirs = {f"--{word}" for words in rows for word in words}
    for _, param in options_by_command(ctx):
        known |= {*param.opts, *param.secondary_opts}
    for page in PAGES:
        named = re.findall(r"`(--[a-z][\w-]+)[^`]*`", (ROOT / page).read_text(encoding="utf-8"))
        assert {one for one in named if one not in known and one not in theirs} == set(), page


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
    (tmp_path / "turbofit.yaml").write_text(profile(), encoding="utf-8")
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


def quoted() -> Iterator[tuple[str, str, list[str]]]:
    """Commands whose answers a page quotes in the same sentence, with the quotes."""
    for page in (*PAGES, *(f"docs/zh/{path.name}" for path in (ROOT / "docs/zh").glob("*.md"))):
        text = _one_line((ROOT / page).read_text(encoding="utf-8"))
        for command, sentence in _QUOTED.findall(text):
            if quotes := re.findall(r'"([^"]+)"', sentence):
                yield page, command, quotes


QUOTED = list(quoted())


@pytest.mark.parametrize(("page", "command", "quotes"), QUOTED)
def test_what_a_page_quotes_of_an_answer_is_in_it(
    page: str, command: str, quotes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command)) in (0, 3), page
    said = _one_line(capsys.readouterr().out)
    for quote in quotes:
        assert _one_line(quote) in said


SKILL = (ROOT / "skills" / "turbofit" / "SKILL.md").read_text(encoding="utf-8")
LLMS = (ROOT / "llms.txt").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", SKILL + LLMS, re.MULTILINE | re.DOTALL)
SKILL_LINES = [line.removeprefix("turbofit ") for block in BLOCKS for line in block.splitlines()]
LOG = (
    "[TM][FATAL][1119.01:01:01.000001][allocator.cc:105] CUDA runtime error: out of memory\n"
    "Aborted (core dumped)\n"
)
#: What a machine without GPUs and servers may answer, by the command; of others 0.
CODES = {
    "machine": {4}, "serve": {4}, "calibrate": {4}, "bench": {3}, "logs": {2},
    "stop": {2}, "doctor": {0, 3, 4}, "predict": {0, 3},
}  # fmt: skip


def no_driver() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def test_every_command_of_the_skill_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    few_presets(monkeypatch)
    (tmp_path / "engine.log").write_text(LOG)
    for line in SKILL_LINES:
        command, _, file = line.partition(" > ")
        argv = shlex.split(command.replace(":23333", ":1"))  # where nobody listens
        code, said = main(argv), capsys.readouterr()
        needs_gpus = argv[0] == "plan" and "--on" not in argv
        codes = {4} if needs_gpus else CODES.get(argv[0], {0})
        assert code in codes, (line, code, said.err)
        if "--json" in argv or argv[:2] == ["report", "--schema"]:
            document = json.loads(said.out)
            assert "error" in document or code in (0, 3) or argv[0] == "doctor", line
        if file:
            (tmp_path / file).write_text(said.out)


def test_what_is_said_of_a_plan_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen2-vl-7b", "--on", "1xrtx3090", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (told,) = re.findall(r"^In a plan, read (.*?)^\n", SKILL, re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([\w.]+)`", told):
        value = plan
        for part in name.split("."):
            assert part in value, name
            value = value[part]
