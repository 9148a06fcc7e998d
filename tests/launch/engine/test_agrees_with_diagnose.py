"""What `serve` says when an engine dies, and what `diagnose` says of the same log."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain
from tests.launch.engine.test_engine_log import BUDGET, CUDA, DONE, START, WARM, tracker
from turbofit.launch.engine.engine_log import end_of

VISION = "  [ 0] InternVit::Impl::Forward @ src/x.cc:1"
TEXT = "  [ 0] LlamaLinear::Forward @ src/x.cc:1"


@pytest.mark.parametrize(
    ("lines", "phase"),
    [
        ((START, CUDA), "weights"),
        ((START, BUDGET, CUDA), "cache"),
        ((START, BUDGET, CUDA, TEXT), "warm-up"),
        ((START, BUDGET, WARM, CUDA), "warm-up"),
        ((START, BUDGET, WARM, CUDA, "  [ 0] Impl::InternalThreadEntry @ src/x.cc:1"), "cache"),
        ((START, BUDGET, WARM, DONE, CUDA, VISION), "vision"),
        ((START, BUDGET, WARM, DONE, CUDA, TEXT), "text"),
    ],
)
def test_both_name_the_same_phase_and_call(lines: tuple[str, ...], phase: str) -> None:
    ended, found = end_of(-6, tracker(*lines)), explain("\n".join(lines))
    assert (ended.kind, found.kind) == ("out_of_memory", "out_of_memory")
    assert (ended.phase, found.phase) == (phase, phase)
    call = lines[-1].partition("] ")[2].partition(" @")[0] if " @ " in lines[-1] else ""
    assert call in ended.message
    assert call in found.what
