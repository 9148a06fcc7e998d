"""What an evaluation is worth, and what a plan publishes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import turbofit
from turbofit.core.errors import UsageError


@pytest.mark.parametrize("goal", ["throughput", "latency", "context"])
def test_the_score_is_the_goals_value_where_images_queue_or_are_lowered(goal: str) -> None:
    """The order of candidates was once carried by the same number: -3.28e+11 requests/s."""
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3060:free=7GiB", engine="turbomind", goal=goal)
    fitting = [one for one in plan.considered if one.fits]
    assert len(fitting) > 1
    assert all(0 < one.score < 1e6 for one in fitting)
    assert all(one.score == 0 for one in plan.considered if not one.fits)
    assert not any("e+" in one.why_not for one in plan.considered)
    chosen = plan.considered[0]
    if goal == "throughput":
        assert plan.throughput is not None
        assert chosen.score == pytest.approx(plan.throughput.requests_per_second, abs=1e-4)
    elif goal == "context":
        assert chosen.score == chosen.kv_tokens
    assert chosen.score == max(one.score for one in fitting)


def test_larger_images_come_before_speed() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3060:free=7GiB", engine="turbomind")
    assert plan.limits.max_pixels_per_image is not None
    smaller = turbofit.plan(
        "qwen2-vl-2b", on="1xrtx3060:free=7GiB", engine="turbomind",
        max_pixels=plan.limits.max_pixels_per_image // 2,
    )  # fmt: skip
    assert smaller.considered[0].score > plan.considered[0].score


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
    "intermediate_size": 2624, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 4, "vocab_size": 32000, "torch_dtype": "float16",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
}  # fmt: skip


def test_what_no_degree_suits_is_said_by_its_reason(tmp_path: Path) -> None:
    """It was "no tensor-parallel degree suits … on 1 GPUs", with a hint to leave --tp out."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(UsageError, match="2624 channels are no whole groups of 128") as told:
        turbofit.plan(str(tmp_path), on="1xrtx3090")
    assert told.value.hint == "take other weights"
