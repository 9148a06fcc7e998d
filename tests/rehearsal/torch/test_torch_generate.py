"""Transformers itself, on pretend GPUs under a CUDA torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, rehearsed_document
from tests.support.checkpoints import write_checkpoint
from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearsal.spec import RehearsalCase, RehearsalRequest, Spec

pytestmark = [
    pytest.mark.exhaustive,  # the check serves: `serving/test_fallback_server`
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]
CARD = PretendGpu("NVIDIA GeForce RTX 3090", total=24268 * MIB)


def test_each_case_is_one_request_whose_prompt_has_the_pictures(tmp_path: Path) -> None:
    folder = write_checkpoint("qwen2-vl-2b", tmp_path / "Qwen2-VL-2B-Instruct")
    cases = (
        RehearsalCase("vision_request", (RehearsalRequest(32, sizes=((448, 448),) * 2),)),
        RehearsalCase("text_prefill", (RehearsalRequest(1000, max_new_tokens=2),)),
    )
    settings = {"dtype": "bfloat16", "device_map": {"": 0}}
    spec = Spec(Scenario((CARD,)), str(folder), "transformers", settings, cases)
    document = rehearsed_document(spec)
    assert document["outcome"] == "served"
    vision, text = document["cases"]
    assert (vision["statuses"], text["statuses"]) == ({"finished": 1}, {"finished": 1})
    # 256 tokens of each picture between its two marks, and a token of each letter.
    assert (vision["tokens"], text["tokens"]) == ([2 * (256 + 2) + 32], [1000])
    assert document["terms"][0]["weights"] >= 2 * 2_208_985_600
