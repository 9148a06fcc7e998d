"""Gemma 3: Transformers' parameters, and its processor's fixed square."""

from __future__ import annotations

import random

import pytest

from tests.support.oracles import count, gemma_of, read
from turbofit.core.errors import UsageError
from turbofit.model.families.engines import engine_problem

NAME = "Gemma3ForConditionalGeneration"


@pytest.mark.parametrize("seed", range(6))
def test_parameters_are_transformers(transformers, seed):
    config = gemma_of(transformers, random.Random(seed))
    model = read(config)
    assert model.parameters == count(transformers, NAME, config)
    assert model.image_rule.tokens(3, 2000) == config.mm_tokens_per_image
    assert model.image_rule.worst_units() == 1
    assert engine_problem(model, "pytorch") is engine_problem(model, "transformers") is None
    assert engine_problem(model, "turbomind")


def test_what_contradicts_itself():
    for part in (
        '"mm_tokens_per_image": 255', '"mm_tokens_per_image": 25',
        '"vision_config": {"vision_use_head": true}', '"vision_config": {"patch_size": 999}',
    ):  # fmt: skip
        with pytest.raises(UsageError):
            read(f'{{"architectures": ["{NAME}"], {part}}}')
