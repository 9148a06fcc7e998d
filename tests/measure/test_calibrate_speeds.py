"""What the program of a measurement prints, what is kept of it, and what later plans know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.machine.test_learned import machine
from tests.support.waiting import HANG, until
from turbofit.core.machine import Machine
from turbofit.core.process.files import state_dir
from turbofit.machine.learned import recall
from turbofit.measure import calibrate_speeds
from turbofit.measure.calibrate_speeds import measure_speeds

pytestmark = pytest.mark.usefixtures("state")


def card(index: int) -> dict[str, Any]:
    return {"cards": {"index": index, "bandwidth": 8.4e11, "flops": 5.6e13}}


def pair(source: int, target: int, *, right: bool = True) -> dict[str, Any]:
    facts = {"bandwidth": 2e10, "latency": 1e-5, "host_bandwidth": 8e9, "right": right}
    return {"pairs": {"source": source, "target": target, "peer": right, **facts}}


TWO = [{"image_seconds": 0.05}, {"torch": "2.9"}, card(0), card(1), pair(0, 1), pair(1, 0)]


def measure(
    folder: Path, lines: list[Any], on: Machine, gpus: tuple[int, ...] = (0, 1), ending: str = ""
) -> tuple[bool, list[str]]:
    """Whether later plans have something of a program that prints these lines; what it said."""
    said: list[str] = []
    script = folder / "program.py"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    script.write_text(f"import os, sys, time\nprint({text!r}, flush=True)\n{ending}\n")
    return measure_speeds(on, gpus, said.append, command=[sys.executable, str(script)]), said


def test_it_is_kept_for_later_plans(tmp_path: Path) -> None:
    on = machine()
    kept, said = measure(tmp_path, [*TWO, "noise", "7"], on)
    assert kept
    assert said == [
        "measured cards, copies between them, and an image on a core: turbofit machine shows them"
    ]
    known = recall(on)
    assert known.measured is not None
    assert [one.index for one in known.measured.cards] == [0, 1]
    assert (known.measured.torch, known.measured.image_seconds) == ("2.9", 0.05)


def test_the_program_sees_these_gpus_under_the_machines_indices(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    told = "os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[2:]"
    ending = f"open({str(shown)!r}, 'w').write(' '.join(({told})))"
    measure(tmp_path, TWO, machine("3xrtx3090"), (2, 0), ending)
    assert shown.read_text() == "GPU-2,GPU-0 2 0"


def test_what_was_known_of_other_gpus_stays(tmp_path: Path) -> None:
    on = machine("4xrtx3090")
    measure(tmp_path, [*TWO, pair(0, 2, right=False)], on)
    measure(
        tmp_path, [{"torch": "3"}, card(2), card(3), pair(2, 3), pair(3, 2)], recall(on), (2, 3)
    )
    found = recall(on).measured
    assert found is not None
    assert sorted(one.index for one in found.cards) == [0, 1, 2, 3]
    assert {(one.source, one.target) for one in found.pairs if not one.right} == {(0, 2)}
    assert (found.torch, found.image_seconds) == ("3", 0.05)


def test_a_wrong_copy_is_said_and_ends_peer_access(tmp_path: Path) -> None:
    on = machine("2xrtx3090,p2p=all")
    _, said = measure(tmp_path, [*TWO[:-1], pair(1, 0, right=False)], on)
    assert said[0].startswith("warning: GPU 0 and GPU 1 copy wrong data to each other")
    assert not recall(on).link(0, 1).peers


def test_a_program_that_dies_has_its_results_and_one_without_any_says_why(tmp_path: Path) -> None:
    on = machine()
    kept, said = measure(tmp_path, TWO, on, ending="os._exit(7)")
    assert (kept, said[0]) == (True, "not measured: all after the program ended with exit code 7")
    no_torch = [TWO[0], {"left_out": "cards and links: there is no torch with CUDA"}]
    kept, said = measure(tmp_path, no_torch, on)
    assert (kept, said[0]) == (True, "not measured: cards and links: there is no torch with CUDA")
    assert measure(tmp_path, [], on, ending="os.kill(os.getpid(), 9)") == (
        False, ["not measured: all after the program ended with exit code -9"],
    )  # fmt: skip


def test_a_disk_that_takes_nothing_ends_no_calibration(tmp_path: Path) -> None:
    state_dir("learned/machine").rmdir()
    state_dir("learned").joinpath("machine").write_text("")
    kept, said = measure(tmp_path, TWO, machine())
    assert not kept
    assert said[-1].startswith("warning: measured speeds are not kept: ")


def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, real = tmp_path / "printed", subprocess.Popen.wait

    def wait(process: subprocess.Popen[bytes], timeout: float) -> int:
        if timeout == calibrate_speeds._LAST:
            return real(process, HANG)
        until(printed.exists, "the results")
        raise subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    hang = f"open({str(printed)!r}, 'w'); import signal; signal.pause()"
    kept, said = measure(tmp_path, TWO, machine(), ending=hang)
    assert (kept, said[0]) == (True, "not measured: all after the program ended with exit code -9")


def test_what_the_driver_holds_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL does not end it, and its end of a pipe would stay open."""
    for name in ("_SECONDS", "_GRACE", "_LAST"):
        monkeypatch.setattr(calibrate_speeds, name, 0.0)
    monkeypatch.setattr("subprocess.Popen.kill", lambda _: None)
    go = tmp_path / "go"
    go.touch()
    ending = f"while os.path.exists({str(go)!r}): time.sleep(0.01)"
    try:
        kept, said = measure(tmp_path, [], machine(), ending=ending)
    finally:
        go.unlink()
    assert not kept
    assert "was killed and hangs in the driver" in said[0]
