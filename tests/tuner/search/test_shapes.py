"""Why there is no shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import turbofit
from turbofit.core.errors import UsageError

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
