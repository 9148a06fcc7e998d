"""Tensors as Transformers names and shapes them are held against the dims and explained whole."""

from __future__ import annotations

import random

import pytest

from tests.model.conftest import write_safetensors
from tests.model.test_oracle_gemma3 import gemma_of
from tests.model.test_oracle_idefics3 import idefics_of
from tests.model.test_oracle_llava import vision_of
from tests.model.test_oracle_mllama import config_of as mllama_of
from tests.model.test_oracle_patches import glm_of, qwen3_of
from tests.model.test_parameters import text_config
from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


def llava_of(transformers, rng):
    text = text_config(rng) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    vision = vision_of(rng, "clip_vision_model")
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def of_qwen3(transformers, rng):
    return qwen3_of(transformers, "Qwen3VL", rng)


def of_qwen3_moe(transformers, rng):
    return qwen3_of(transformers, "Qwen3VLMoe", rng)


FAMILIES = [gemma_of, idefics_of, llava_of, mllama_of, glm_of, of_qwen3, of_qwen3_moe]


def written(transformers, config, folder):
    """A header-only checkpoint with the tensors of Transformers' class."""
    import torch

    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    seen, tensors = set(), {}
    for name, tensor in model.named_parameters(remove_duplicate=True):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = ("BF16", tuple(tensor.shape))
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    (folder / "preprocessor_config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", tensors)
    return tensors


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
