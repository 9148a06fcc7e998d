"""``turbofit.pipeline`` on LMDeploy's PyTorch engine itself, on a pretend card."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretend.cuda_torch import CUDA_PATH, run
from turbofit.rehearse.twin import write_checkpoint

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]

PROGRAM = """
import os, sys, warnings
os.environ["LMDEPLOY_ENABLE_CHECK_ENV"] = "0"
import turbofit
from PIL import Image
pipe = turbofit.pipeline({folder!r}, engine="pytorch", concurrency=2)
large = pipe(("what?", Image.new("RGB", (3584, 3584))))
two = pipe([("what?", [Image.new("RGB", (448, 448))] * 2)])[0]
engine = pipe.async_engine.engine
result(dict(
    tokens=large.input_token_len, text=len(large.text), refused=str(two.error_message or two.text),
    segments=os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), machine=pipe.plan.machine.source,
    planned=pipe.plan.kv.tokens, peak=pipe.plan.gpus[0].peak, name=pipe.plan.engine.name,
    reserved=torch.cuda.max_memory_reserved(),
))
pipe.close()
"""


@pytest.mark.slow
def test_the_card_is_measured_and_the_worst_image_lives(tmp_path: Path) -> None:
    folder = write_checkpoint("qwen2-vl-2b", tmp_path / "Qwen2-VL-2B-Instruct")
    ran = run(tmp_path / "run", PROGRAM.format(folder=str(folder)), on="1xrtx3060", seconds=200)
    assert ran.code == 0, ran.text[-3000:]
    seen = ran.result
    assert seen["name"] == "pytorch"
    assert seen["machine"] == "nvml"
    assert seen["segments"] == "expandable_segments:True"
    assert seen["tokens"] > 16384
    assert seen["reserved"] < 12 << 30
    assert ran.report["refused"] is None or ran.report["refused"]["count"] < 20
