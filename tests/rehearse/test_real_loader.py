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
    pytest.mark.exhaustive,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]


def rehearsed(model: str, *words: str, cuda: bool) -> dict[str, Any]:
    path = f"{CUDA_PATH}:{ROOT}" if cuda else str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "turbofit", "rehearse", model, *words, "--json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_model_of_staging_is_what_torch_stages() -> None:
    words = ("internvl2-2b", "--on", "2xrtx3090")
    modelled, real = (rehearsed(*words, cuda=cuda) for cuda in (False, True))
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
