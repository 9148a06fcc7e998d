"""Qwen3.5: delta nets and gates that no engine runs are refused."""

from __future__ import annotations

import pytest

from tests.support.tiny_checkpoints import read
from turbofit.core.errors import UsageError


def qwen3_5(**change: object) -> dict[str, object]:
    return {"text_config": change, "vision_config": {"out_hidden_size": 4096}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (qwen3_5(layer_types=["linear_attention"]), "names 1 layers of 32"),
        (qwen3_5(layer_types=["linear_attention"] * 32), "no layer with attention"),
        (qwen3_5(layer_types=["moving_average"] * 32), "unknown kind: 'moving_average'"),
        (qwen3_5(linear_num_key_heads=5), "5 does not divide 32 value heads"),
        (qwen3_5(attn_output_gate=False), "is false"),
    ],
)
def test_layers_that_no_engine_runs_are_refused(config, said):
    with pytest.raises(UsageError, match=said):
        read(config={"architectures": ["Qwen3_5ForConditionalGeneration"], **config})
