"""Llama 3.2 Vision: Transformers' parameters, and its padding of every image to the most tiles."""

from __future__ import annotations

import random

import pytest

from tests.support.oracles import count, mllama_of, read
from turbofit.core.errors import UsageError
from turbofit.core.images import CrossRule
from turbofit.model.families.engines import engine_problem


@pytest.mark.parametrize("seed", range(8))
def test_parameters_are_transformers(transformers, seed):
    config = mllama_of(transformers, random.Random(seed))
    model = read(config)
    assert model.parameters == count(transformers, "MllamaForConditionalGeneration", config)
    assert list(model.text.cross_layers) == config.text_config.cross_attention_layers


def test_defaults_and_engines(transformers):
    name = "MllamaForConditionalGeneration"
    model = read(f'{{"architectures": ["{name}"]}}')
    assert model.parameters == count(transformers, name, transformers.MllamaConfig())
    assert "no engine" in engine_problem(model, "pytorch")
    assert engine_problem(model, "turbomind")
    assert engine_problem(model, "transformers") is None


def test_what_contradicts_itself():
    vision = '{"architectures": ["MllamaForConditionalGeneration"], "vision_config": {%s}}'
    for part in ('"vision_output_dim": 7681', '"attention_heads": 7', '"max_num_tiles": 0'):
        with pytest.raises(UsageError):
            read(vision % part)


def test_every_image_has_the_most_tiles(transformers):
    import torch

    processor = transformers.MllamaImageProcessor(
        size={"height": 28, "width": 28}, max_image_tiles=4
    )
    rule = CrossRule(tile_size=28, tokens_per_tile=5, max_dynamic_patch=4, thumbnail=False)
    rng = random.Random(5)
    for _ in range(40):
        width, height = rng.randrange(1, 200), rng.randrange(1, 200)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        found = processor([image], return_tensors="pt")["pixel_values"].shape
        assert found[2] == rule.units(width, height) == rule.worst_units() == 4
        assert rule.tokens(width, height) == 1
    assert (rule.unit_tokens(4), rule.unit_tokens(12), rule.units_within(3)) == (1, 3, 12)
    assert (rule.lower_limits(), rule.largest_limit(4), rule.largest_limit(3)) == ((4,), 4, None)
