"""`turbofit.pipeline` in a command of ``turbofit pretend --model NAME``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import HANG

pytestmark = pytest.mark.lmdeploy

SCRIPT = """
from lmdeploy import GenerationConfig

import turbofit

short = GenerationConfig(max_new_tokens=2)
with turbofit.pipeline("internvl2-1b", context=2048, images=1) as pipe:
    print(pipe.plan.machine.gpus[0].name, pipe("hi", gen_config=short).generate_token_len)
"""


def test_a_pipeline_opens_a_model_without_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("lmdeploy")
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["--on", "1xrtx3060", "--model", "InternVL2-1B", "--", sys.executable, "script.py"]
    leases = tmp_path / "leases"
    done = subprocess.run(
        [sys.executable, "-m", "turbofit", "pretend", *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False,
        env={**os.environ, "TURBOFIT_LEASES": str(leases)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("NVIDIA GeForce RTX 3060 2\n")
    assert "PRETEND GPUs" in done.stderr
    assert not leases.exists()
