"""TurboMind with LMDeploy's loader on a CUDA build of torch: nothing of loading is modelled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.pretend.cuda_torch import CUDA_PATH, ROOT

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]


def rehearsed(model: str, *words: str, cuda: bool) -> dict[str, Any]:
    path = f"{CUDA_PATH}:{ROOT}" if cuda else str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "turbofit", "rehearse", model, *words, "--json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.parametrize(
    ("model", "on"), [("qwen2-vl-2b", "1xrtx3090"), ("internvl2-2b", "2xrtx3090")]
)
def test_the_model_of_staging_is_what_torch_stages(model: str, on: str) -> None:
    modelled, real = (rehearsed(model, "--on", on, cuda=cuda) for cuda in (False, True))
    assert real["rehearsal"]["outcome"] == modelled["rehearsal"]["outcome"] == "served"
    for ours, theirs in zip(modelled["gpus"], real["gpus"], strict=True):
        assert [t["rehearsed"] for t in ours["ledger"]] == [
            t["rehearsed"] for t in theirs["ledger"]
        ]


def test_a_death_while_loading_is_torchs() -> None:
    """Qwen2-VL-7B on 16 GB: what torch stages is what is too much."""
    document = rehearsed("qwen2-vl-7b", "--on", "1xv100-16g", "--defaults", cuda=True)
    rehearsal = document["rehearsal"]
    assert rehearsal["outcome"] == "out_of_memory"
    assert rehearsal["death"]["phase"] in ("weights", "prepare")
