"""LMDeploy's front ends over Transformers' processors: the image tokens that reach the engine."""

from __future__ import annotations

import json
import random

import pytest

from tests.support.oracles import (
    front_end,
    gemma_of,
    glm,
    picture,
    qwen3,
    tokens_of,
    with_processor,
    written,
)
from turbofit.model.source import resolve_model

pytestmark = pytest.mark.lmdeploy


@pytest.mark.parametrize("make", [qwen3, glm])
def test_patches_reach_the_engine_as_planned(transformers, tmp_path, make):
    folder = tmp_path / "tiny"
    token = make(transformers, folder)
    rule = resolve_model(str(folder)).image_rule
    front = front_end(folder)
    rng = random.Random(6)
    for _ in range(12):
        size = rng.randrange(10, 1200), rng.randrange(10, 1200)
        # What would lower or raise the limit elsewhere is not read here.
        item = {"type": "image", "data": picture(*size), "max_pixels": 784, "min_pixels": 1}
        found = front.preprocess([{"role": "user", "content": [item]}], f"a{token}b")
        expected = rule.tokens(*size)
        assert found["input_ids"].count(front.image_token_id) == expected
        assert len(found["multimodal"]) == 1


def gemma(transformers, folder):
    config = gemma_of(transformers, random.Random(2))
    config.mm_tokens_per_image = 4
    written(transformers, config, folder)
    names = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    size = {"height": 28, "width": 28}
    with_processor(
        folder, "Gemma3",
        {"image_processor_type": "Gemma3ImageProcessor", "size": size, "image_seq_length": 4},
        names,
    )  # fmt: skip
    path = folder / "tokenizer_config.json"
    keys = ("image_token", "boi_token", "eoi_token")
    extra = {"extra_special_tokens": dict(zip(keys, names, strict=True))}
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    outer = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    (folder / "processor_config.json").write_text(json.dumps(outer))


def test_gemma_pools_every_image_to_as_many_tokens(transformers, tmp_path):
    folder = tmp_path / "tiny"
    gemma(transformers, folder)
    rule = resolve_model(str(folder)).image_rule
    sizes = [(28, 28), (3, 900), (900, 30)]
    found = tokens_of(folder, [(picture(*size), {"do_pan_and_scan": True}) for size in sizes])
    assert found == [rule.tokens(*size) for size in sizes] == [4, 4, 4]
