"""What TurboMind's warm-up runs, and what it leaves out where it reads what another start chose."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.rehearsal.pretend.cuda_torch import run
from turbofit.serving.engine.gemm_tuning import records_of

#: What turbofit does with such a file: `serving/engine/test_gemm_tuning`.
pytestmark = [pytest.mark.lmdeploy, pytest.mark.exhaustive]

PROGRAM = """
import os
from pathlib import Path
from tests.support.checkpoints import write_checkpoint
folder = "qwen2.5-0.5b"
if not os.path.exists(folder):
    write_checkpoint(folder, Path(folder))
from lmdeploy import TurbomindEngineConfig, pipeline
config = TurbomindEngineConfig(session_len=4096, cache_max_entry_count=0.3, max_batch_size=8)
made = pipeline(folder, backend_config=config)
result("made")
sys.stdout.flush()
os._exit(0)
"""
#: The tokens of each forward of the warm-up.
FORWARDS = re.compile(r"Warm-up lengths: ([\d, ]+)")


def test_a_start_that_imports_runs_no_forward_of_the_warm_up(tmp_path: Path) -> None:
    file, folder = tmp_path / "tuning", tmp_path / "model"
    first = run(folder, PROGRAM, TM_LOG_LEVEL="INFO", TM_GEMM_EXPORT=str(file))
    assert first.result == "made"
    records = records_of(file)
    assert records > 20
    again = run(folder, PROGRAM, TM_LOG_LEVEL="INFO", TM_GEMM_IMPORT=str(file))
    assert f"{records} records imported" in again.text
    assert len(FORWARDS.findall(first.text)[0].split(",")) > 10
    assert "Warm-up" not in again.text
    # What the warm-up leaves in its pool is not there: less memory, never more.
    peaks = [ran.report["gpus"][0]["peak"] for ran in (first, again)]
    assert peaks[1] < peaks[0]
