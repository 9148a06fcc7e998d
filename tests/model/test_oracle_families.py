"""Transformers' own classes: their tensors are explained to the element, and their defaults read.

What a checkpoint stores is held by its header, so that a sum that agrees is the parameters' number.
"""

from __future__ import annotations

import json
import random
from functools import partial

import pytest

from tests.support.oracles import (
    count,
    gemma_of,
    glm_of,
    idefics_of,
    llava_of,
    mllama_of,
    qwen3_5_of,
    qwen3_of,
    read,
    written,
)
from turbofit.core.errors import UsageError
from turbofit.core.images import CrossRule
from turbofit.model.source import resolve_model

FAMILIES = {
    "Gemma3": gemma_of, "Idefics3": idefics_of, "SmolVLM": partial(idefics_of, kind="SmolVLM"),
    "Llava": llava_of, "Llava of SigLIP": partial(llava_of, tower="siglip"),
    "LlavaNext": partial(llava_of, family="LlavaNext"),
    "LlavaOnevision": partial(llava_of, family="LlavaOnevision", tower="siglip"),
    "Mllama": mllama_of, "Glm4v": glm_of, "Qwen3VL": qwen3_of,
    "Qwen3VLMoe": partial(qwen3_of, family="Qwen3VLMoe"), "Qwen3_5": qwen3_5_of,
    "Qwen3_5Moe": partial(qwen3_5_of, family="Qwen3_5Moe"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(5))
def test_every_element_is_explained(transformers, tmp_path, family, seed):
    config = FAMILIES[family](transformers, random.Random(f"{family}{seed}"))
    written(transformers, config, tmp_path / "m")
    model = resolve_model(str(tmp_path / "m"))
    assert model.weight_bytes == 2 * model.parameters
    assert not model.warnings or family == "Glm4v"
    assert not model.needs_remote_code


@pytest.mark.parametrize("family", FAMILIES)
def test_another_models_config_is_refused(transformers, tmp_path, family):
    config = FAMILIES[family](transformers, random.Random(1))
    written(transformers, config, tmp_path / "m")
    text = config.get_text_config()
    for key in ("vocab_size", "num_hidden_layers"):
        own = getattr(text, key)
        setattr(text, key, own + 1)
        (tmp_path / "m" / "config.json").write_text(config.to_json_string(use_diff=False))
        with pytest.raises(UsageError, match=r"says|names 4 layers"):
            resolve_model(str(tmp_path / "m"))
        setattr(text, key, own)


@pytest.mark.parametrize(
    ("family", "out"),
    [
        ("Llava", None), ("LlavaNext", None), ("LlavaOnevision", None), ("Mllama", None),
        ("Glm4v", None), ("Qwen3VL", 4096), ("Qwen3VLMoe", 2048), ("Qwen3_5", 4096),
        ("Qwen3_5Moe", 2048),
    ],
)  # fmt: skip
def test_defaults_are_transformers(transformers, family, out):
    name = f"{family}ForConditionalGeneration"
    parts = {"vision_config": {"out_hidden_size": out}} if out else {}
    config = getattr(transformers, f"{family}Config")(**parts)
    model = read(json.dumps({"architectures": [name], **parts}))
    assert model.parameters == count(transformers, name, config)
    assert model.text.max_position_embeddings == config.text_config.max_position_embeddings


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("Gemma3", {"mm_tokens_per_image": 255}), ("Gemma3", {"mm_tokens_per_image": 25}),
        ("Gemma3", {"vision_config": {"vision_use_head": True}}),
        ("Gemma3", {"vision_config": {"patch_size": 999}}),
        ("Mllama", {"vision_config": {"vision_output_dim": 7681}}),
        ("Mllama", {"vision_config": {"attention_heads": 7}}),
        ("Mllama", {"vision_config": {"max_num_tiles": 0}}),
    ],
)  # fmt: skip
def test_what_contradicts_itself(family, part):
    with pytest.raises(UsageError):
        read(json.dumps({"architectures": [f"{family}ForConditionalGeneration"], **part}))


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
