"""`turbofit.pipeline` in a command of ``turbofit pretend --model NAME``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serving import needs
from tests.support.waiting import HANG

pytestmark = pytest.mark.lmdeploy
needs("lmdeploy")

SCRIPT = """
import gc

gc.disable()  # what it imports stays
from lmdeploy import GenerationConfig
from PIL import Image

import turbofit

short = GenerationConfig(max_new_tokens=2)
pipe = turbofit.pipeline("internvl2-2b", context=8192, images=1, tp=2)
end = pipe.async_engine.close
pipe.async_engine.close = lambda: (end(), print("closed"))
seen = pipe(("what?", Image.new("RGB", (640, 480))), gen_config=short)
print(pipe.plan.machine.gpus[1].name, seen.generate_token_len, seen.input_token_len > 256)
"""


def ran(script: str, model: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    words = ["--on", "2xrtx3090", "--model", model, "--", sys.executable, "script.py"]
    return subprocess.run(
        [sys.executable, "-m", "turbofit", "pretend", *words],
        cwd=folder, capture_output=True, text=True, timeout=HANG, check=False,
        env={**os.environ, "TURBOFIT_LEASES": str(folder / "leases")},
    )  # fmt: skip


def test_a_pipeline_opens_a_model_without_its_weights(tmp_path: Path) -> None:
    """Over two cards without peer access: its engine answers a picture, and ends with Python."""
    done = ran(SCRIPT, "InternVL2-2B", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("NVIDIA GeForce RTX 3090 2 True\nclosed\n")
    assert "PRETEND GPUs" in done.stderr
    assert not (tmp_path / "leases").exists()
