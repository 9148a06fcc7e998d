"""Stage t of bench/gpu: what it starts, and what it keeps of a tuning that fails or hangs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from bench.gpu import tuning
from bench.gpu.load import Load
from bench.gpu.shapes import Shape
from turbofit.cli.command_group import TURBOFIT

LOAD = Load(requests=200, concurrency=16, seconds=100.0)
SHAPE = Shape("qwen2-vl-2b", "pytorch")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert options["timeout"] == 360
        return subprocess.CompletedProcess(command, 0, json.dumps({"trials": [1]}), "")

    monkeypatch.setattr(tuning.subprocess, "run", run)
    monkeypatch.setattr(tuning, "checkpoint", lambda model, scratch: tmp_path / model)
    return commands


def test_it_asks_for_the_load_of_stage_c(started: list[list[str]], tmp_path: Path) -> None:
    found = tuning.tuned(SHAPE, tmp_path, LOAD, 300.0, {})
    assert (found["code"], found["tuning"]) == (0, {"trials": [1]})
    (command,) = started
    words = command[command.index("tune") :]
    for option, value in (
        ("--engine", "pytorch"), ("--time", "300s"), ("--concurrency", "16"),
        ("--image-size", "896x896"), ("--output-tokens", "64"),
    ):  # fmt: skip
        assert words[words.index(option) + 1] == value
    name, *rest = words
    known = TURBOFIT.get_command(click.Context(TURBOFIT), name)
    assert known is not None
    known.make_context(name, rest).close()  # the command line takes all of them


def test_a_tuning_that_fails_or_hangs_is_told(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 3, "", "nothing meets the SLO\nhint: more\n")

    monkeypatch.setattr(tuning.subprocess, "run", fails)
    found = tuning.tuned(SHAPE, tmp_path, LOAD, 300.0, {})
    assert (found["code"], found["said"]) == (3, ["nothing meets the SLO", "hint: more"])

    def hangs(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(tuning.subprocess, "run", hangs)
    assert tuning.tuned(SHAPE, tmp_path, LOAD, 300.0, {})["outcome"] == "out_of_time"
