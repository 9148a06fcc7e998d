"""TurboMind with LMDeploy's loader on a CUDA build of torch: nothing of loading is modelled."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pretend.cuda_torch import CUDA_PATH, PATH, ROOT, cuda_json

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.exhaustive,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]


def rehearsed(model: str, *words: str, path: str = PATH) -> Any:
    return cuda_json("-m", "turbofit", "rehearse", model, *words, "--json", path=path)


def test_the_model_of_staging_is_what_torch_stages() -> None:
    words = ("internvl2-2b", "--on", "2xrtx3090")
    modelled, real = (rehearsed(*words, path=path) for path in (str(ROOT), PATH))
    assert real["rehearsal"]["outcome"] == modelled["rehearsal"]["outcome"] == "served"
    for ours, theirs in zip(modelled["gpus"], real["gpus"], strict=True):
        assert [t["rehearsed"] for t in ours["ledger"]] == [
            t["rehearsed"] for t in theirs["ledger"]
        ]


def test_a_death_while_loading_is_torchs() -> None:
    """Qwen2-VL-7B on 16 GB: what torch stages is what is too much."""
    document = rehearsed("qwen2-vl-7b", "--on", "1xv100-16g", "--defaults")
    rehearsal = document["rehearsal"]
    assert rehearsal["outcome"] == "out_of_memory"
    assert rehearsal["death"]["phase"] in ("weights", "prepare")
