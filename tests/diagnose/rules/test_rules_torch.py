"""Torch's own out-of-memory inside LMDeploy's PyTorch engine: its options are what help."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain
from tests.diagnose.rules.test_rules_versions import TRACE, frame

SAID = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 8.37 GiB. GPU 0 has a total"
    " capacity of 11.62 GiB of which 7.06 GiB is free. Including non-PyTorch memory, this process"
    " has 4.56 GiB memory in use. Of the allocated memory 2.16 GiB is allocated by PyTorch, and"
    " 20.00 MiB is reserved by PyTorch but unallocated.\n"
)
ENGINE = frame("lmdeploy/pytorch/engine/engine.py", "from_pretrained")
MODELS = "lmdeploy/pytorch/models"


@pytest.mark.parametrize(
    ("frames", "phase", "changes"),
    [
        (ENGINE + frame("lmdeploy/pytorch/engine/agent.py", "build_cache_engine"), "cache",
         ("lower --cache-max-entry-count",)),
        (ENGINE + frame("lmdeploy/pytorch/weight_loader/model_weight_loader.py", "load_weights"),
         "weights", ("more GPUs (--tp)",)),
        (frame(f"{MODELS}/qwen2_5_vl.py", "forward", "self.visual(pixel_values)"), "vision",
         ("--cache-max-entry-count", "--max-prefill-token-num", "smaller images")),
        (frame(f"{MODELS}/gpt_oss.py", "forward", "self.experts(hidden_states)"), "text",
         ("--cache-max-entry-count", "--max-prefill-token-num")),
    ],
)  # fmt: skip
def test_options_of_the_pytorch_engine(frames: str, phase: str, changes: tuple[str, ...]) -> None:
    found = explain(TRACE + frames + SAID)
    assert (found.kind, found.phase) == ("out_of_memory", phase)
    assert len(found.changes) == len(changes)
    assert all(part in told for part, told in zip(changes, found.changes, strict=True))
    said = " ".join(found.why)
    assert "TurboMind" not in said
    assert ("whole matrix" in said) == (phase != "cache")


def test_a_program_of_its_own_is_told_of_what_it_can_change() -> None:
    found = explain(TRACE + frame("transformers/models/x/modeling_x.py", "forward") + SAID)
    assert any("a smaller batch" in one for one in found.changes)
    assert not any("--max-prefill-token-num" in one for one in found.changes)
