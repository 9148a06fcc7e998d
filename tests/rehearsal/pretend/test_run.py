"""How `turbofit pretend` runs a command: its Python, its process group, its end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from
from turbofit.rehearsal.pretend import run
from turbofit.rehearsal.pretend.process_memory import ProcessMemory
from turbofit.rehearsal.pretend.record import MachineRecord
from turbofit.rehearsal.pretend.run import FinishedRun, report, run_pretend, scenario_of, site_of
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearsal.pretend.usage import Event, Process, SharedRecord
from turbofit.report.painters.terminal import paint
from turbofit.report.views.measured_view import pretend_view


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python whose torch is a CUDA build, as far as its files say."""
    library = tmp_path / "site" / "torch" / "lib"
    library.mkdir(parents=True)
    (library / "libtorch_cuda.so").touch()
    (tmp_path / "site" / "torch" / "__init__.py").touch()
    script = tmp_path / "bin" / "python3"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def test_the_site_of_a_python(python: Path) -> None:
    site = python.parents[1] / "site"
    assert site_of([str(python), "train.py"]) == site
    (site / "torch" / "lib" / "libtorch_cuda.so").unlink()
    assert site_of([str(python)]) is None  # a CPU torch wants nothing


def test_of_anything_else_it_is_this_one(
    python: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "cuda_site", lambda: tmp_path)
    assert (site_of(["sh", "-c", "true"]), site_of(["no-such-command"])) == (tmp_path, tmp_path)
    assert site_of(["sh", "-c", "true"], str(python)) == python.parents[1] / "site"
    with pytest.raises(UsageError, match="no Python"):
        site_of(["sh"], "/no/python")


ROW = (0,) * 15


def process(pid: int, peak: int, refused_at: int = 0) -> Process:
    return Process(
        pid=pid, refused_at=refused_at, alive=False, allocated=(peak, *ROW), context=(0, *ROW),
        late=(0, *ROW), peak=(peak, *ROW), at_peak=(peak, *ROW), pinned_peak=0,
    )  # fmt: skip


def memory(pid: int, command: str, *lines: str) -> ProcessMemory:
    head = (Event("I", (str(pid), "1"), ()), Event("N", (command,), ()))
    events = (Event(line[0], tuple(line.split()[1:]), ()) for line in lines)
    return ProcessMemory(1, None, MIB).read((*head, *events))


def refusal(asked: int) -> str:
    return f"O 0 0 -1 {asked} {5 * MIB} {asked}"


def test_the_newest_refusal_and_a_process_that_called_exec() -> None:
    memories = (
        memory(9, "old", refusal(7 * MIB)),
        memory(9, "new", f"A 0 0 -1 1 {MIB} a", "P run", f"A 0 0 -1 1 {2 * MIB} b"),
        memory(8, "other", refusal(8 * MIB), refusal(9 * MIB)),
    )
    memories[1].complete = False
    shared = SharedRecord(
        (process(9, 1 * MIB, refused_at=50), process(9, 2 * MIB), process(8, 0, refused_at=40)),
        (3 * MIB, *ROW), 4 * MIB,
    )  # fmt: skip
    scenario = Scenario((PretendGpu("Card", total=10 * MIB, used=MIB),))
    machine = MachineRecord(scenario, shared, memories)
    document = report(FinishedRun(("prog", "x"), -9, 1.0, machine))
    assert (document["exit_code"], document["signal"]) == (137, "SIGKILL")
    assert [p["command"] for p in document["processes"]] == ["old", "new"]
    phases = [row["phase"] for p in document["processes"] for row in p["gpus"]]
    assert phases == ["start", "run"]
    assert document["gpus"][0]["left_at_peak"] == 6 * MIB
    refused = document["refused"]
    assert (refused["count"], refused["command"], refused["asked"]) == (3, "old", 7 * MIB)
    text = " ".join(paint(pretend_view(document), width=100).split())
    for words in (
        "killed by SIGKILL", "3 were refused in all", "its timeline is full",
        "page-locked host memory: at most 4.0 MiB", "values and speed are not real",
    ):  # fmt: skip
        assert words in text


def test_the_machine_of_a_spec() -> None:
    scenario = scenario_of(machine_from("2xrtx3090+1xl4"), lambda gpu: gpu.index * MIB)
    assert [g.name for g in scenario.gpus] == ["NVIDIA GeForce RTX 3090"] * 2 + ["NVIDIA L4"]
    assert all(g.reserved > 0 for g in scenario.gpus)
    assert scenario.context == 2 * MIB  # the largest
    text = scenario.text("/t/", "/s")
    assert {"timeline /t/", "shared /s", f"context {2 * MIB}"} <= set(text.splitlines())
    assert f"reserved 0 {scenario.gpus[0].reserved}" in text
    assert "shared" not in scenario.text("/t")


def test_a_folder_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError):
            run_pretend(["true"], Scenario(()), keep=folder)
