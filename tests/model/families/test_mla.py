"""Multi-head latent attention: dims, and parameters as Transformers' classes count them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import count
from turbofit.core.errors import UsageError
from turbofit.model.config import Section
from turbofit.model.families.text import read_text
from turbofit.model.parameters import text_parameters
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.twin import write_checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 20,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 14,
    "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "pad_token_id": 0,
}  # fmt: skip
PRESETS = ["deepseek-v2-lite", "glm-4.7-flash"]


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3", "Glm4MoeLite"])
@pytest.mark.parametrize("change", [{}, {"q_lora_rank": None}, {"attention_bias": True}])
def test_parameters_are_transformers_own(transformers: Any, family: str, change: Any) -> None:
    values = SMALL | change
    config = getattr(transformers, f"{family}Config")(**values)
    config.architectures = [f"{family}ForCausalLM"]
    text = read_text(
        Section(json.loads(config.to_json_string(use_diff=False)), "c"), config.architectures[0]
    )
    assert text.mla is not None
    assert text.moe is not None
    # The biases that only choose experts are buffers there.
    buffers = text.moe.layers * text.moe.experts if text.moe.correction else 0
    assert text.moe.correction is (family != "DeepseekV2")
    counted = count(transformers, config.architectures[0], config)
    assert text_parameters(text) == counted + buffers
    assert (text.kv_heads, text.head_dim, text.mla.q_rank) == (1, 16, values["q_lora_rank"] or 0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_checkpoint_is_read_as_its_preset(name: str, tmp_path: Path) -> None:
    found, preset = resolve_model(str(write_checkpoint(name, tmp_path))), preset_model(name)
    assert found.text == preset.text
    assert (found.parameters, found.warnings) == (preset.parameters, ())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"moe_layer_freq": 2}, "dense layers behind the first"),
        (
            {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse", "sparse"]},
            "behind the first",
        ),
    ],
)
def test_what_is_refused(change: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_text(Section(SMALL | change, "c"), "DeepseekV2ForCausalLM")
