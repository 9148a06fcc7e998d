"""LMDeploy's PyTorch engine itself, on pretend GPUs under a CUDA torch.

Figures: shared/facts/rehearsal-torch.md, measured with another prototype.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, rehearsed_document
from tests.support.checkpoints import write_checkpoint
from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearsal.spec import RehearsalCase, RehearsalRequest, Spec

pytestmark = [
    pytest.mark.exhaustive,  # the check serves: `serving/test_serve_pretend_pytorch`
    pytest.mark.lmdeploy,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]
#: The prototype's card: 24268 - 300 MiB are left when a process has its context of 360.
CARD = PretendGpu("NVIDIA GeForce RTX 3090", total=24328 * MIB, sm=(8, 6), sm_count=82)
#: Of the card once the cache is cut.
GONE = 3 << 30
PICTURE = RehearsalCase("vision_request", (RehearsalRequest(32, sizes=((1344, 1568),)),))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2-vl-2b", tmp_path_factory.mktemp("twin") / "Qwen2-VL-2B-Instruct")


def rehearsed(checkpoint: Path, *cases: RehearsalCase, late: int) -> dict[str, Any]:
    """The document of LMDeploy's defaults."""
    machine = Scenario((replace(CARD, late=late),), context=360 * MIB)
    spec = Spec(machine, str(checkpoint), "pytorch", {}, cases)
    return rehearsed_document(spec)


def test_qwen2_vl_2b_at_lmdeploys_defaults_until_a_picture_kills_it(checkpoint: Path) -> None:
    huge = RehearsalCase("huge", (RehearsalRequest(32, sizes=((3584, 3584),)),))
    document = rehearsed(checkpoint, PICTURE, huge, late=GONE)
    assert document["schema"] == "turbofit.rehearsal/1"
    cache, (card,) = document["cache"], document["gpus"]
    assert (cache["free"], cache["num_gpu_blocks"]) == ([19492 * MIB], 7791)
    assert cache["tokens"] == 7791 * 64
    after = card["phases"]["warm-up"]
    # To the MiB with torch 2.12.1; other torches allocate a little otherwise.
    assert after["allocated"] / MIB == pytest.approx(17868.6, rel=0.001)
    assert after["reserved"] == pytest.approx(18158 * MIB, rel=0.002)
    served, dead = document["cases"]
    assert set(served["statuses"]) == {"finished"}
    assert dead["statuses"] == {"unavailable": 1}
    picture = card["phases"]["case vision_request"]
    assert picture["allocated_peak"] == pytest.approx(18332.7 * MIB, rel=0.001)
    assert picture["reserved_peak"] == pytest.approx(18838 * MIB, rel=0.002)
    assert picture["peak"] == picture["reserved_peak"] + card["contexts"]
    # Torch's own word and the account's agree in every phase.
    for phase in card["phases"].values():
        assert phase["reserved"] + card["contexts"] == phase["held"]
    peaks = [phase["peak"] for phase in card["phases"].values()]
    assert card["left_at_peak"] == CARD.total - GONE - max(peaks)
    assert document["outcome"] == "out_of_memory"
    death = document["death"]
    assert death["phase"] == "case huge"
    assert death["message"].startswith("CUDA out of memory. Tried to allocate")
    assert death["asked"] > death["left"] >= 0
    assert "qwen2_vl.py" in death["where"]
