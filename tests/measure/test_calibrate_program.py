"""The program that measures cards, links and an image, run as `calibrate` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, run
from tests.support.waiting import HANG
from turbofit.measure.calibrate_speeds import PROGRAM


def test_an_image_is_measured_without_torch_and_without_a_card() -> None:
    """The reference photograph takes milliseconds to seconds of any core."""
    done = subprocess.run(
        [sys.executable, "-I", PROGRAM, "0"], capture_output=True, text=True, check=True
    )
    first, *others = map(json.loads, done.stdout.splitlines())
    assert 0.001 < first["image_seconds"] < 10
    assert others == [{"left_out": "cards and links: there is no torch with CUDA beside turbofit"}]


@pytest.mark.slow
@pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch")
def test_the_program_itself_runs_on_pretend_gpus_and_is_not_deceived(tmp_path: Path) -> None:
    program = (
        f"import runpy; sys.argv = ['x', '60', '5', '3']\n"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    )
    ran = run(tmp_path / "run", program, on="2xrtx3090", seconds=5 * HANG)
    lines = [json.loads(line) for line in ran.text.splitlines() if line.startswith("{")]
    assert [next(iter(line)) for line in lines] == [
        "image_seconds", "torch", "cards", "cards", "pairs", "pairs", *["reduces"] * 3,
    ]  # fmt: skip
    pairs = [line["pairs"] for line in lines if "pairs" in line]
    assert [(one["source"], one["target"]) for one in pairs] == [(5, 3), (3, 5)]
    # No kernel computes there, so no copy's bytes arrive: it must say so.
    assert not any(one["right"] or one["peer"] for one in pairs)
