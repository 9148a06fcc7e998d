"""Process handling of `Supervisor`, against a server that only pretends to be LMDeploy."""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.plans import plausible_plan
from tests.support.processes import STANDIN, Child, gone, pids

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).with_name("driver.py")
FAKE = (sys.executable, str(STANDIN / "fake_server.py"))


@pytest.fixture
def launch(tmp_path: Path, port: int, children: list[Child]):
    def run(
        script: str = "serve", *, gpus: int = 1, check: bool = True, runner: tuple[str, ...] = FAKE,
        waits: bool = True, **timing: float,
    ) -> Child:  # fmt: skip
        """The server; ``waits``: once it is ready."""
        plan = tmp_path / "plan.json"
        plan.write_text(plausible_plan(gpus=gpus, tp=1).to_json())
        words = (plan, tmp_path, port, "check" if check else "no", json.dumps(timing))
        argv = [sys.executable, str(DRIVER), *map(str, words), *runner]
        child = Child(argv, STANDIN_SCRIPT=script)
        children.append(child)
        if waits:
            child.wait_for("READY")
        return child

    return run


def ends(child: Child, number: signal.Signals = signal.SIGTERM) -> None:
    """In order, with all that it started."""
    child.process.send_signal(number)
    assert child.finish() == 0
    assert f"ended {number.name}" in child.stderr
    assert all(gone(pid) for pid in pids(child))


def test_phases_figures_ready_and_an_orderly_end(launch, tmp_path: Path, port: int) -> None:
    child = launch()
    assert f"READY http://127.0.0.1:{port}" in child.lines
    phases = [x.partition("phase: ")[2].split(" ")[0] for x in child.lines if "phase: " in x]
    assert (phases[0], phases[-1]) == ("starting", "ready")
    expected = ["starting", "weights", "cache", "warm-up", "serving", "check", "ready"]
    assert [x for x in expected if x in phases] == phases
    assert "forecast 19,714.0, +2.0%" in child.stderr
    ends(child)
    assert "Object cache budget" in (tmp_path / "engine-0.log").read_text()


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("oom_weights", 6, "while it loaded weights (in turbomind::ModelRoot::prepare)"),
        ("refuses", 5, "answered 500"),
        ("fallback", 5, "PyTorch engine, and the plan is for TurboMind"),
        ("stuck", 5, "was not ready after"),
    ],
)
def test_deaths(script: str, code: int, words: str, launch) -> None:
    timing = {"start": 1.0} if script == "stuck" else {}
    child = launch(script, waits=False, **timing)
    assert child.finish() == code, child.stderr
    assert words in child.lines[-1]
    assert "engine-0.log" in child.lines[-1]
    assert all(gone(pid) for pid in pids(child))


def test_two_replicas_and_one_that_dies(launch, port: int) -> None:
    child = launch(gpus=2, backoff=0.1)
    assert f"READY http://127.0.0.1:{port} http://127.0.0.1:{port + 1}" in child.lines
    # The second engine is ours, by the id that the launcher printed.
    os.kill(pids(child)[1], signal.SIGSEGV)
    child.wait_for("engine 1: the engine ended while it served with signal SIGSEGV")
    child.wait_for("engine 1: starting again in 0.1 s")
    child.wait_for("engine 1: phase: ready", 2)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        assert answer.status == 200
    ends(child)


def test_a_second_signal_does_not_wait(launch) -> None:
    child = launch("deaf", check=False, drain=3600.0)
    assert "phase: check" not in child.stderr
    child.process.send_signal(signal.SIGTERM)
    child.wait_for("stopping")
    ends(child)


def test_a_command_that_is_not_there(launch, tmp_path: Path) -> None:
    child = launch(runner=("/no/lmdeploy",), waits=False)
    assert child.finish() == 5
    assert "exit code 1" in child.lines[-1]
    assert "No such file" in (tmp_path / "engine-0.log").read_text()
