"""Intern-S1-Pro against LMDeploy's class, rotary tables and front end; Transformers has none."""

from __future__ import annotations

import json
import random

import pytest
from msgspec.structs import replace

from tests.support.oracles import front_end, picture, with_processor
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule
from turbofit.core.units import MIB
from turbofit.memory.pytorch.weights import weight_classes
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.twin import twin_of, write_model

NAME = "InternS1ProForConditionalGeneration"
#: The keys of the published config.json that say a dim.
PUBLISHED = {
    "architectures": [NAME], "model_type": "interns1_pro", "tie_word_embeddings": False,
    "text_config": {
        "attention_bias": False, "decoder_sparse_step": 1, "dtype": "bfloat16", "head_dim": 128,
        "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 262144,
        "mlp_only_layers": [], "moe_intermediate_size": 1536, "num_attention_heads": 64,
        "num_experts": 512, "num_experts_per_tok": 8, "num_hidden_layers": 94,
        "num_key_value_heads": 4, "rope_theta": 5000000, "vocab_size": 155008,
        "rope_scaling": {
            "rope_type": "default", "fope_init_factor": 0.5, "fope_sep_head": True,
            "num_inv_freq": None,
        },
    },
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "in_channels": 3, "intermediate_size": 4096,
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 4096,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "auto_map": {"AutoConfig": "configuration_interns1_pro.InternS1ProConfig"},
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"],
    },
}  # fmt: skip
BOUNDS = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16}


def model_of(folder, config, processor=BOUNDS):
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return resolve_model(str(folder))


def changed(part, **keys):
    return {**PUBLISHED, part: {**PUBLISHED[part], **keys}}


def test_the_preset_is_the_published_config(tmp_path):
    model, preset = model_of(tmp_path, PUBLISHED), preset_model("intern-s1-pro")
    assert (model.text, model.vision, model.image_rule) == (
        preset.text, preset.vision, preset.image_rule
    )  # fmt: skip
    assert model.needs_remote_code
    assert preset.needs_remote_code
    assert model.parameters == preset.parameters
    assert preset.weight_bytes == pytest.approx(919.0e9, rel=1e-3)  # the hub's size of its files
    for engine, word in (("turbomind", "encoder"), ("transformers", "own code")):
        assert word in engine_problem(model, engine)
    assert engine_problem(model, "pytorch") is None


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({**PUBLISHED, "ts_config": {"d_model": 64}}, "time series"),
        (changed("vision_config", deepstack_visual_indexes=[8]), "drops its features"),
        (changed("vision_config", out_hidden_size=64), "out_hidden_size"),
    ],
)
def test_what_no_account_is_of_is_refused(tmp_path, config, match):
    with pytest.raises(UsageError, match=match):
        model_of(tmp_path, config)


@pytest.mark.lmdeploy
def test_frequencies_are_lmdeploys(transformers, tmp_path):
    import torch
    from lmdeploy.pytorch.backends.default.rotary_embedding import (
        FopeParameters,
        FopeRotaryEmbeddingImpl,
    )

    rng = random.Random(3)
    for _ in range(60):
        dim, theta = rng.choice([64, 128]), rng.choice([1e4, 1e6, 5e6])
        length, given = rng.randrange(512, 1 << 18), rng.choice([None, None, 20])
        inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        made = FopeRotaryEmbeddingImpl(
            dim, length, params=FopeParameters(num_inv_freq=given, inv_freq=inv_freq)
        )
        scaling = {"fope_sep_head": True, "num_inv_freq": given}
        config = changed(
            "text_config", head_dim=dim, rope_theta=theta, max_position_embeddings=length,
            rope_scaling=scaling,
        )  # fmt: skip
        assert model_of(tmp_path, config).text.fourier == made.inv_freq.shape[-1]


def tiny(folder):
    """A checkpoint of few layers and experts, with the stand-in's names."""
    model = preset_model("intern-s1-pro")
    moe = replace(model.text.moe, experts=4, experts_per_token=2, intermediate=24, layers=3)
    text = replace(
        model.text, hidden=64, layers=3, heads=4, kv_heads=2, intermediate=96, vocab=152_000,
        head_dim=16, moe=moe, fourier=5,
    )  # fmt: skip
    vision = replace(
        model.vision, hidden=32, layers=2, heads=2, intermediate=48, image_size=48, deepstack=0
    )
    return write_model(twin_of(replace(model, text=text, vision=vision, quantization=None)), folder)


@pytest.mark.lmdeploy
def test_parameters_are_the_engines(engine_parameters, tmp_path):
    from turbofit.rehearse.turbomind.hfconfig import register_intern_s1_pro

    register_intern_s1_pro()
    folder = tiny(tmp_path / "m")
    model = resolve_model(str(folder))
    assert model.architecture == NAME
    assert engine_parameters(folder) == model.parameters
    assert (model.weight_bytes, model.warnings) == (2 * model.parameters, ())


@pytest.mark.lmdeploy
def test_image_tokens_reach_the_engine_as_planned(transformers, tmp_path):
    """With Qwen3-VL's processor in place of the checkpoint's own, which names its image's class."""
    from turbofit.rehearse.turbomind.hfconfig import register_intern_s1_pro

    register_intern_s1_pro()
    folder = tiny(tmp_path / "m")
    with_processor(
        folder, "Qwen3VL",
        {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "merge_size": 2,
         "size": {"shortest_edge": 65_536, "longest_edge": 400_000}, "temporal_patch_size": 2},
    )  # fmt: skip
    rule = resolve_model(str(folder)).image_rule
    assert rule == PatchRule(
        patch_size=16, merge=2, min_pixels=65_536, max_pixels=400_000, client_knobs=False
    )
    assert rule.videos is None
    front = front_end(folder)
    assert type(front).__name__ == "InternS1ProVisionModel"
    rng = random.Random(6)
    for _ in range(12):
        size = rng.randrange(10, 1200), rng.randrange(10, 1200)
        item = {"type": "image", "data": picture(*size), "max_pixels": 784}
        found = front.preprocess([{"role": "user", "content": [item]}], "a<|image_pad|>b")
        assert found["input_ids"].count(front.image_token_id) == rule.tokens(*size)


def test_weights_are_the_engine_s():
    """Four layers of 64 experts in 16 bits on a pretend A100: what the tensors ask for."""
    model = preset_model("intern-s1-pro")
    moe = replace(model.text.moe, layers=4, experts=64)
    few = replace(model, text=replace(model.text, layers=4, moe=moe), quantization=None)
    held = sum(weight_classes(few, 1).values())
    assert held == pytest.approx(12_832.3 * MIB, abs=MIB)
