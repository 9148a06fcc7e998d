"""Qwen3-Omni's thinker against Transformers' class, and LMDeploy's front end and class."""

from __future__ import annotations

import json
import random

import pytest
from msgspec.structs import replace

from bench.compatibility.checkpoints import CHECKPOINTS
from tests.support.checkpoints import write_safetensors
from tests.support.oracles import front_end, picture, qwen3_tower, read, text_config
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule
from turbofit.core.model import Quantization
from turbofit.model.families.engines import engine_problem
from turbofit.model.source import resolve_model

NAME = "Qwen3OmniMoeForConditionalGeneration"
SPEECH = {"talker.model.norm.weight": (64,), "code2wav.decoder.0.conv.weight": (8, 8, 3)}


def omni_of(transformers, rng):
    text = text_config(rng) | {"head_dim": 8, "attention_bias": rng.random() < 0.5}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
    text |= {"decoder_sparse_step": 1}
    vision = qwen3_tower(rng, text)
    heads = vision["num_heads"]
    audio = {
        "encoder_layers": rng.randrange(1, 4), "d_model": heads * 8,
        "encoder_attention_heads": heads, "encoder_ffn_dim": rng.randrange(5, 60),
        "num_mel_bins": rng.choice([16, 80, 128]), "output_dim": text["hidden_size"],
        "downsample_hidden_size": rng.randrange(4, 30), "max_source_positions": 40,
    }  # fmt: skip
    thinker = {"text_config": text, "vision_config": vision, "audio_config": audio}
    config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker)
    config.architectures = [NAME]
    return config


def thinker_of(transformers, config):
    """Parameters of the thinker by their names in a checkpoint."""
    import torch
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3OmniMoeThinkerForConditionalGeneration(config.thinker_config)
    return {f"thinker.{name}": tuple(one.shape) for name, one in model.named_parameters()}


def elements(shapes) -> int:
    import math

    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("seed", range(6))
def test_parameters(transformers, seed):
    config = omni_of(transformers, random.Random(seed))
    model = read(config)
    assert model.parameters == elements(thinker_of(transformers, config))
    assert model.text.architecture == "Qwen3MoeForCausalLM"
    assert model.vision.audio is not None
    assert engine_problem(model, "pytorch") is None
    assert "encoder" in engine_problem(model, "turbomind")
    assert "no account" in engine_problem(model, "transformers")
    packed = replace(model, quantization=Quantization(method="fp8", bits=8, group_size=128))
    assert "take 16 bits" in engine_problem(packed, "pytorch")


def test_defaults_are_transformers(transformers):
    parts = {
        "text_config": {"num_attention_heads": 32, "head_dim": 128},
        "vision_config": {"out_hidden_size": 2048}, "audio_config": {"output_dim": 2048},
    }  # fmt: skip
    config = transformers.Qwen3OmniMoeConfig(thinker_config=parts)
    model = read(json.dumps({"architectures": [NAME], "thinker_config": parts}))
    assert model.parameters == elements(thinker_of(transformers, config))
    length = config.thinker_config.text_config.max_position_embeddings
    assert model.text.max_position_embeddings == length


@pytest.mark.parametrize("seed", range(3))
def test_what_speaks_is_not_loaded(transformers, tmp_path, seed):
    config = omni_of(transformers, random.Random(f"names{seed}"))
    config.enable_audio_output = True
    shapes = thinker_of(transformers, config)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    tensors = {name: ("BF16", shape) for name, shape in (shapes | SPEECH).items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    model = resolve_model(str(tmp_path))
    assert model.weight_bytes == 2 * model.parameters == 2 * elements(shapes)
    assert not model.warnings
    inner = config.thinker_config.text_config
    for key in ("vocab_size", "num_hidden_layers"):
        own = getattr(inner, key)
        setattr(inner, key, own + 1)
        (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
        with pytest.raises(UsageError, match="says"):
            resolve_model(str(tmp_path))
        setattr(inner, key, own)


@pytest.mark.lmdeploy
def test_image_tokens_reach_the_engine_as_planned(transformers, tmp_path):
    """Under the checkpoint's bounds, and under those of a request."""
    folder = CHECKPOINTS["Qwen3OmniMoeForConditionalGeneration"](tmp_path / "m")
    rule = resolve_model(str(folder)).image_rule
    assert rule == PatchRule(
        patch_size=16, merge=2, min_pixels=3136, max_pixels=12_845_056, client_knobs=False
    )
    assert rule.by_request
    assert rule.videos is None
    front = front_end(folder)
    assert type(front).__name__ == "Qwen3OmniModel"
    rng = random.Random(6)
    for _ in range(24):
        size = rng.randrange(1, 900), rng.randrange(1, 900)
        if max(size) > 199 * min(size):
            continue
        limit = rng.choice([None, 200_704])
        asked = {"image": replace(rule, max_pixels=limit).request_knobs} if limit else None
        item = {"type": "image", "data": picture(*size), "max_pixels": 784, "min_pixels": 1}
        message = {"role": "user", "content": [item]}
        found = front.preprocess([message], "a<|image_pad|>b", asked)
        tokens = found["input_ids"].count(front.image_token_id)
        assert tokens == rule.tokens(*size, limit)
