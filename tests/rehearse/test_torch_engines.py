"""LMDeploy's PyTorch engine and Transformers themselves, on pretend GPUs under a CUDA torch.

Figures: shared/facts/rehearsal-torch.md, measured with another prototype.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretend.cuda_torch import CUDA_PATH, ROOT

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]
MIB = 1 << 20
#: The prototype's card: 24268 - 300 MiB are left when a process has its context of 360.
CARD = "1xrtx3090:total=24328MiB"
DEFAULTS = ("qwen2-vl-2b", "--engine", "pytorch", "--defaults")


def rehearsed(*words: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "turbofit", "rehearse", *words, "--json"],
        env={**os.environ, "PYTHONPATH": f"{CUDA_PATH}:{ROOT}"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == code, (document.get("death"), document.get("error"), done.stderr)
    assert document["schema"] == "turbofit.rehearsal-torch/1"
    return document


def test_qwen2_vl_2b_at_lmdeploys_defaults() -> None:
    document = rehearsed(
        "qwen2-vl-2b",
        "--engine",
        "pytorch",
        "--defaults",
        "--on",
        CARD,
        "--image-size",
        "1344x1568",
    )
    assert document["outcome"] == "served"
    cache, (card,) = document["cache"], document["gpus"]
    assert cache["free"] == [19492 * MIB]
    assert cache["num_gpu_blocks"] == 7791
    assert cache["tokens"] == 7791 * 64
    after = card["after_start"]
    # To the MiB with torch 2.12.1; other torches allocate a little otherwise.
    assert after["allocated"] / MIB == pytest.approx(17868.6, rel=0.001)
    assert after["reserved"] == pytest.approx(18158 * MIB, rel=0.002)
    assert after["held"] == after["reserved"] + card["contexts"]
    assert after["left"] == 24328 * MIB - after["held"]
    assert card["cache"]["allocated"] >= cache["bytes"][0]
    cases = {case["name"]: case for case in document["cases"]}
    assert list(cases) == ["vision_request", "vision_forward", "text_prefill", "sampling"]
    assert all(set(case["statuses"]) == {"finished"} for case in cases.values())
    (picture,) = cases["vision_request"]["gpus"]
    assert picture["allocated_peak"] == pytest.approx(18332.7 * MIB, rel=0.001)
    assert picture["reserved_peak"] == pytest.approx(18838 * MIB, rel=0.002)
    assert picture["held_peak"] == picture["reserved_peak"] + card["contexts"]
    # Torch's own word and the account's agree in every phase.
    for phase in card["phases"].values():
        assert phase["torch"]["reserved"] + card["contexts"] == phase["held"]
    assert document["decides"] in cases
    assert card["left_at_peak"] == min(c["gpus"][0]["left"] for c in cases.values())


def test_a_picture_kills_it_and_it_stays_dead() -> None:
    document = rehearsed(
        *DEFAULTS, "--on", "1xrtx3090:total=8GiB",
        "--cache-max-entry-count", "0.99", code=3,
    )  # fmt: skip
    assert document["outcome"] == "out_of_memory"
    death = document["death"]
    assert death["phase"] == "case vision_request"
    assert death["message"].startswith("CUDA out of memory. Tried to allocate")
    assert death["asked"] > death["left"] >= 0
    assert any("qwen2_vl.py" in line for line in death["where"])
    assert death["afterwards"]["next_request"] == "unavailable"


def test_a_card_without_room_for_the_cache() -> None:
    document = rehearsed(*DEFAULTS, "--on", "1xrtx3090:total=7GiB", code=3)
    assert document["outcome"] == "out_of_memory"
    assert document["death"]["phase"] == "sizing"
    assert document["death"]["message"].startswith("No enough gpu memory for")


@pytest.mark.slow
def test_each_rank_keeps_its_own_books() -> None:
    document = rehearsed(
        *DEFAULTS, "--on", "2xrtx3090:total=24328MiB", "--tp", "2",
        "--distributed-executor-backend", "mp", "--image-size", "448x448",
    )  # fmt: skip
    assert document["outcome"] == "served"
    first, second = document["gpus"]
    for card in (first, second):
        weights = card["weights"]["allocated"]
        assert weights == pytest.approx(2366.6 * MIB, rel=0.01)
        assert {"build", "sizing", "cache", "warm-up", "case sampling"} <= set(card["phases"])
    assert document["cache"]["num_gpu_blocks"] > 2 * 7791


def test_transformers() -> None:
    document = rehearsed(
        "qwen2-vl-2b", "--engine", "transformers", "--on", CARD, "--image-size", "1344x1568"
    )
    assert document["outcome"] == "served"
    (card,) = document["gpus"]
    cases = {case["name"]: case for case in document["cases"]}
    assert set(cases["text_prefill"]["statuses"]) == {"finished"}
    assert round(card["weights"]["allocated"] / MIB, 1) == 4213.3
    (picture,) = cases["vision_request"]["gpus"]
    assert picture["allocated_peak"] == pytest.approx(4748.4 * MIB, rel=0.01)
    assert picture["reserved_peak"] == pytest.approx(5128 * MIB, rel=0.01)
    assert card["weights"]["held"] == card["weights"]["reserved"]


@pytest.mark.slow
def test_a_draft_takes_what_a_plan_says(tmp_path: Path) -> None:
    """Drafts run with a stand-in for FlashAttention-3; a config alone is a draft's stand-in."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
        "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256,
        "draft_vocab_size": 32000, "max_position_embeddings": 2048,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "turbofit", "rehearse", "llama-3.2-1b", "--engine", "pytorch",
         "--on", "1xrtx3060:total=12GiB", "--concurrency", "4", "--json",
         "--speculative-algorithm", "eagle3", "--speculative-draft-model", str(tmp_path),
         "--speculative-num-draft-tokens", "2"],
        env={**os.environ, "PYTHONPATH": f"{CUDA_PATH}:{ROOT}"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["rehearsal"]["outcome"] == "served"
    (card,) = plan["gpus"]
    told = {term["term"]: term for term in card["ledger"]}
    # One layer of sixteen and the draft's, each of 64 tokens of 8 heads of 64 channels.
    assert plan["rehearsal"]["cache"]["object_size"] == 17 * 2 * 64 * 8 * 64 * 2
    for name in ("load_fragmentation", "pool_warmup", "text_prefill", "sampling"):
        assert told[name]["rehearsed"] <= told[name]["bytes"], name
    assert all(peak <= card["peak"] for case in plan["rehearsal"]["cases"] for peak in case["peak"])
