"""skills/turbofit/SKILL.md and llms.txt: every command in them runs, pages that they name exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pynvml
import pytest

from tests.support.plans import few_presets
from turbofit.cli.command_group import COMMANDS
from turbofit.cli.main import main

ROOT = Path(__file__).parents[1]
SKILL = (ROOT / "skills" / "turbofit" / "SKILL.md").read_text(encoding="utf-8")
LLMS = (ROOT / "llms.txt").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", SKILL + LLMS, re.MULTILINE | re.DOTALL)
LINES = [line.removeprefix("turbofit ") for block in BLOCKS for line in block.splitlines()]
LOG = (
    "[TM][FATAL][1119.01:01:01.000001][allocator.cc:105] CUDA runtime error: out of memory\n"
    "Aborted (core dumped)\n"
)
#: What a machine without GPUs and servers answers, by the command; of others 0.
CODES = {"machine": 4, "serve": 4, "calibrate": 4, "bench": 3, "watch": 2, "logs": 2, "stop": 2}


def no_driver() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def codes_of(argv: list[str]) -> set[int]:
    if argv[0] == "doctor":
        return {0, 3, 4}  # a finding; that there is no GPU
    if argv[0] == "predict":
        return {0, 3}  # a death that is forecast
    if argv[0] == "plan" and "--on" not in argv:
        return {4}
    return {CODES.get(argv[0], 0)}


def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    few_presets(monkeypatch)
    (tmp_path / "engine.log").write_text(LOG)
    for line in LINES:
        command, _, file = line.partition(" > ")
        argv = shlex.split(command.replace(":23333", ":1"))  # where nobody listens
        code, said = main(argv), capsys.readouterr()
        assert code in codes_of(argv), (line, code, said.err)
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


def test_the_skill_has_its_head_and_names_commands_and_pages() -> None:
    head = SKILL.split("---")[1]
    assert re.search(r"^name: turbofit$", head, re.MULTILINE)
    described = re.search(r"^description: (.+)$", head, re.MULTILINE)
    assert described is not None
    assert len(described[1]) <= 1024
    rows = re.findall(r"^\| [^|]+\? \| (.+) \|$", SKILL, re.MULTILINE)
    assert len(rows) >= 9
    assert {word for row in rows for word in re.findall(r"`(\w+)", row)} <= set(COMMANDS)
    for target in re.findall(r"\]\(([^)#]+)", SKILL + LLMS):
        assert (ROOT / target).exists(), target
    assert "in no package index yet" in SKILL
    assert not re.search(r"pip install \"?turbofit", SKILL + LLMS)
