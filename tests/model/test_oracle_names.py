"""Tensors as Transformers names and shapes them are held against the dims and explained whole."""

from __future__ import annotations

import random

import pytest

from tests.support.oracles import (
    gemma_of,
    glm_of,
    idefics_of,
    llava_of,
    mllama_of,
    of_qwen3,
    of_qwen3_moe,
    written,
)
from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model

FAMILIES = [gemma_of, idefics_of, llava_of, mllama_of, glm_of, of_qwen3, of_qwen3_moe]


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_every_element_is_explained(transformers, tmp_path, make, seed):
    config = make(transformers, random.Random(f"{make.__name__}{seed}"))
    written(transformers, config, tmp_path / "m")
    model = resolve_model(str(tmp_path / "m"))
    assert model.weight_bytes == 2 * model.parameters
    assert not [text for text in model.warnings if make is not glm_of]
    assert not model.needs_remote_code


@pytest.mark.parametrize("make", FAMILIES)
def test_another_models_config_is_refused(transformers, tmp_path, make):
    config = make(transformers, random.Random(1))
    tensors = written(transformers, config, tmp_path / "m")
    text = config.get_text_config()
    for key in ("vocab_size", "num_hidden_layers"):
        own = getattr(text, key)
        setattr(text, key, own + 1)
        (tmp_path / "m" / "config.json").write_text(config.to_json_string(use_diff=False))
        with pytest.raises(UsageError, match="says"):
            resolve_model(str(tmp_path / "m"))
        setattr(text, key, own)
    assert tensors
