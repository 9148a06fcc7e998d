"""Phi-3-vision: LMDeploy's class for parameters and pages; token counts that others publish."""

from __future__ import annotations

import json
import random

import pytest

from tests.support.oracles import read
from turbofit.core.errors import UsageError
from turbofit.core.images import HdRule
from turbofit.model.families.engines import engine_problem
from turbofit.model.source import resolve_model

CONFIG = {
    "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v",
    "auto_map": {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    },
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False,
    "img_processor": {
        "image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model", "num_img_tokens": 144,
    },
    "embd_layer": {
        "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
        "use_hd_transform": True, "with_learnable_separator": True,
    },
}  # fmt: skip


def pages(crops):
    return HdRule(tile_size=336, tokens_per_tile=144, max_dynamic_patch=crops)


@pytest.mark.parametrize(("crops", "tokens"), [(4, 757), (16, 1921)])
def test_published_counts(crops, tokens):
    """What vLLM's own tests (test_phi3v.py) expect of a photograph of about 3 : 2."""
    assert pages(crops).tokens(1770, 1180) == tokens


@pytest.mark.parametrize("crops", [1, 4, 16, 17])
def test_tokens_never_pass_the_worst(crops):
    rule, rng = pages(crops), random.Random(crops)
    worst = 0
    for _ in range(600):
        size = rng.randrange(1, 3000), rng.randrange(1, rng.choice([30, 3000]))
        tokens = rule.tokens(*size)
        assert rule.units(*size) == rule.worst_units() == crops + 1
        assert tokens <= rule.unit_tokens(crops + 1)
        assert crops + 1 <= rule.units_within(tokens)
        worst = max(worst, tokens)
    assert rule.tokens(336, 336 * crops) == rule.unit_tokens(crops + 1)
    assert rule.lower_limits()[0] == rule.largest_limit(crops + 1) == crops
    assert rule.largest_limit(1) is None


@pytest.mark.lmdeploy
def test_a_page_has_the_tokens_that_lmdeploy_makes(transformers):
    import torch
    from lmdeploy.pytorch.models.phi3_v import Phi3ImageEmbedding

    inner = Phi3ImageEmbedding.__wrapped__
    made = inner.__new__(inner)
    torch.nn.Module.__init__(made)
    made.hd_transform_order, made.image_dim_out = "sub_glb", 1024
    made.glb_GN, made.sub_GN = torch.zeros(1, 1, 4096), torch.zeros(1, 1, 1, 4096)
    made.img_projection = torch.nn.Linear(4096, 1)
    for rows, columns in ((1, 1), (2, 3), (6, 1), (1, 5)):
        features = torch.zeros(1, 7, 576, 1024)
        sizes = [(336 * rows, 336 * columns)]
        found = made.hd_feature_transform(features, sizes).shape[0]
        assert pages(rows * columns).tokens(336 * columns, 336 * rows) == found


@pytest.mark.lmdeploy
def test_parameters_are_the_engines(engine_parameters, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4}))
    model = resolve_model(str(tmp_path))
    assert engine_parameters(tmp_path) == model.parameters
    assert model.image_rule == pages(4)
    assert model.needs_remote_code
    assert engine_problem(model, "pytorch") is None
    assert engine_problem(model, "turbomind")
    assert engine_problem(model, "transformers")


@pytest.mark.parametrize(
    "change",
    [
        {"img_processor": {"model_name": "other"}}, {"img_processor": None},
        {"embd_layer": {**CONFIG["embd_layer"], "hd_transform_order": "glb_sub"}},
        {"embd_layer": "default"},
    ],
)  # fmt: skip
def test_variants_that_lmdeploy_does_not_run(change):
    with pytest.raises(UsageError):
        read(json.dumps({**CONFIG, **change}))
