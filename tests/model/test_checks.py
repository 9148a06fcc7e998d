"""A config and its tensors must be of one model."""

from __future__ import annotations

import pytest

from tests.support.tiny_checkpoints import LLAMA, llama_tensors, make
from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


def test_stored_dtype_wins_over_the_config(tmp_path):
    model = resolve_model(make(tmp_path / "tiny", tensors=llama_tensors(dtype="BF16")))
    assert model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"vocab_size": 101}, ("101", "100x256")),
        ({"num_hidden_layers": 3}, ("3 layers", "has 2")),
        ({"num_hidden_layers": 1}, ("1 layers", "has 2")),
        ({"intermediate_size": 511}, ("511", "512x256")),
        ({"num_key_value_heads": 2}, ("256", "128x256")),
        ({"head_dim": 64}, ("128", "256x256")),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, both):
    with pytest.raises(UsageError) as error:
        resolve_model(make(tmp_path / "x", LLAMA | change, llama_tensors()))
    assert all(part in error.value.message for part in both)


def test_a_checkpoint_without_head_must_be_tied(tmp_path):
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(UsageError, match="lm_head"):
        resolve_model(make(tmp_path / "x", tensors=tensors))
    tied = resolve_model(make(tmp_path / "y", LLAMA | {"tie_word_embeddings": True}, tensors))
    assert tied.weight_bytes == 2 * tied.parameters


def test_elements_that_no_dim_explains_are_said(tmp_path):
    tensors = llama_tensors() | {"value_head.weight": ("F16", (256,))}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (64,))
    warnings = resolve_model(make(tmp_path / "x", tensors=tensors)).warnings
    assert len(warnings) == 1
    assert "256 elements more" in warnings[0]
