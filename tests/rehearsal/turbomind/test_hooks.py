"""What TurboMind's loader stages with a CUDA build of torch, and as it is modelled without one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, PATH, ROOT, cuda_json

pytestmark = [
    pytest.mark.exhaustive,  # the check serves: `serving/test_serve_pretend_pytorch`
    pytest.mark.lmdeploy,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]


def loaded(model: str, *words: str, path: str = PATH) -> Any:
    """The first engine, loaded with the CUDA build of torch, or as its loading is modelled."""
    plan = cuda_json("-m", "turbofit", "rehearse", model, *words, "--json", path=path)
    return plan["engines"][0]


def test_the_model_of_staging_is_what_torch_stages() -> None:
    words = ("internvl2-2b", "--on", "2xrtx3090")
    modelled, real = (loaded(*words, path=path) for path in (str(ROOT), PATH))
    assert real["rehearsal"]["outcome"] == modelled["rehearsal"]["outcome"] == "served"
    for ours, theirs in zip(modelled["ledgers"], real["ledgers"], strict=True):
        pairs = zip(ours["terms"], theirs["terms"], strict=True)
        assert all(one["rehearsed"] == other["rehearsed"] for one, other in pairs)
    # Qwen2-VL-7B on 16 GB: what torch stages is what is too much.
    rehearsal = loaded("qwen2-vl-7b", "--on", "1xv100-16g", "--defaults")["rehearsal"]
    assert rehearsal["outcome"] == "out_of_memory"
    assert rehearsal["death"]["phase"] in ("weights", "prepare")
