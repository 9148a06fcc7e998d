"""Intern-S1-Pro and Kimi-K2.5, as published, against LMDeploy's classes and front ends.

Kimi's own processor is code of its repository, which was not run: a stand-in with its interface,
around Transformers' image processor, is what LMDeploy's front end loads here.
"""

from __future__ import annotations

import json
import random
from math import prod
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from tests.support.oracles import check_images, front_end, with_processor
from turbofit.core.errors import UsageError
from turbofit.core.images import NavitRule, PatchRule
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import tensors, twin_of, write_model
from turbofit.rehearsal.turbomind.hfconfig import register_intern_s1_pro, register_kimi

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


def changed(part, published=PUBLISHED, **keys):
    return {**published, part: {**published[part], **keys}}


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
    register_intern_s1_pro()
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
def test_image_tokens_reach_the_engine_as_planned(transformers, tmp_path):
    """With Qwen3-VL's processor in place of the checkpoint's own, which names its image's class."""
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
    check_images(front, rule, "a<|image_pad|>b", max_pixels=784)


KIMI_NAME = "KimiK25ForConditionalGeneration"
PACKED = {
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {
            "dynamic": False, "group_size": 32, "num_bits": 4, "strategy": "group",
            "symmetric": True, "type": "int",
        },
    }},
    "format": "pack-quantized", "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "ignore": [
        "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
}  # fmt: skip
#: The keys of the published config.json that say a dim.
KIMI = {
    "architectures": [KIMI_NAME], "model_type": "kimi_k25", "tie_word_embeddings": False,
    "media_placeholder_token_id": 163605, "dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
    "text_config": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "hidden_size": 7168,
        "first_k_dense_replace": 1, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 262144, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1, "num_attention_heads": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 163840, "quantization_config": PACKED, "tie_word_embeddings": False,
    },
    "vision_config": {
        "init_pos_emb_height": 64, "init_pos_emb_time": 4, "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2], "merge_type": "sd2_tpool", "mm_hidden_size": 1152,
        "mm_projector_type": "patchmerger", "patch_size": 14, "pos_emb_type": "divided_fixed",
        "projector_ln_eps": 1e-05, "text_hidden_size": 7168,
        "video_attn_type": "spatial_temporal", "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304, "vt_num_attention_heads": 16, "vt_num_hidden_layers": 27,
    },
}  # fmt: skip
MEDIA = {
    "in_patch_limit": 16384, "patch_size": 14, "merge_kernel_size": 2,
    "patch_limit_on_one_side": 512, "in_patch_limit_each_frame": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "published", "processor"),
    [("intern-s1-pro", PUBLISHED, BOUNDS), ("kimi-k2.5", KIMI, {"media_proc_cfg": MEDIA})],
)
def test_the_preset_is_the_published_config(tmp_path, preset, published, processor):
    model, preset = model_of(tmp_path, published, processor), preset_model(preset)
    assert (model.text, model.vision, model.image_rule, model.parameters) == (
        preset.text, preset.vision, preset.image_rule, preset.parameters,
    )  # fmt: skip
    assert model.needs_remote_code
    assert preset.needs_remote_code
    if published is KIMI:  # GiB as a listing of the published files counts them
        assert model.quantization == preset.quantization
        assert f"{preset.weight_bytes / 2**30:.2f}" == "554.27"
    else:  # the hub's size of its files
        assert preset.weight_bytes == pytest.approx(919.0e9, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({**PUBLISHED, "ts_config": {"d_model": 64}}, "time series"),
        (changed("vision_config", deepstack_visual_indexes=[8]), "drops its features"),
        (changed("vision_config", out_hidden_size=64), "out_hidden_size"),
        (changed("vision_config", KIMI, merge_type="other"), "sd2_tpool"),
        (changed("vision_config", KIMI, video_attn_type="other"), "spatial_temporal"),
        (changed("vision_config", KIMI, patch_size=16), "is not 14"),
        (changed("vision_config", KIMI, text_hidden_size=64), "text_hidden_size"),
        (changed("vision_config", KIMI, mm_hidden_size=64), "mm_hidden_size"),
        (changed("vision_config", KIMI, init_pos_emb_width=32), "init_pos_emb_width"),
        ({**KIMI, "text_config": None}, "text_config"),
    ],
)
def test_what_is_not_run_or_accounted_for_is_refused(tmp_path, config, match):
    with pytest.raises(UsageError, match=match):
        model_of(tmp_path, config, {**BOUNDS, "media_proc_cfg": MEDIA})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ignore": ["lm_head"], "config_groups": {"group_0": {
            "format": "pack-quantized", "weights": {"group_size": 32}}}}, "for experts only"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "no account of Kimi-K2.5"),
        ({"config_groups": {"group_0": {"weights": {"group_size": 128}}}}, "groups of 32"),
    ],
)  # fmt: skip
def test_other_ways_of_packing_are_refused(tmp_path, change, words):
    config = changed("text_config", KIMI, quantization_config={**PACKED, **change})
    model = model_of(tmp_path, config, {"media_proc_cfg": MEDIA})
    assert words in engine_problem(model, "pytorch")


LIMITS = [(16384, 512), (4096, 512), (1024, 64), (300, 512), (7, 16), (65536, 512)]


@pytest.mark.parametrize(("budget", "side"), LIMITS)
def test_patches_are_transformers(transformers, budget, side):
    module = pytest.importorskip("transformers.models.kimi_k25.image_processing_kimi_k25")
    processor = module.Kimi_K25ImageProcessor(
        max_patches=budget, size={"max_height": side, "max_width": side}
    )
    rule = NavitRule(patch_size=14, merge=2, max_pixels=budget * 14**2, side=side)
    rng, worst = random.Random(budget), 0
    for i in range(600):
        longest = rng.choice([30, 500, 3000, 9000, 60_000])
        width, height = rng.randrange(1, longest), rng.randrange(1, longest)
        if i % 3 == 0:
            width, height = 14 * (width // 14 + 1) - i % 2, 14 * (height // 14 + 1) - 1
        found = rule.units(width, height)
        assert found == processor.get_number_of_image_patches(height, width)
        worst = max(worst, found)
    assert worst <= rule.worst_units()


def tiny_kimi(folder, packing="compressed-tensors"):
    """A checkpoint of few layers and experts, with the stand-in's names."""
    register_kimi()
    model = preset_model("kimi-k2.5")
    moe = replace(
        model.text.moe, experts=4, experts_per_token=2, intermediate=32, layers=2,
        shared_intermediate=32,
    )  # fmt: skip
    text = replace(
        model.text, hidden=64, layers=3, heads=4, intermediate=96, vocab=152_000, moe=moe
    )
    vision = replace(model.vision, hidden=32, layers=2, heads=2, intermediate=48, image_size=112)
    packed = model.quantization if packing else None
    twin = twin_of(replace(model, text=text, vision=vision, quantization=packed))
    return write_model(twin, folder), twin


@pytest.fixture
def built(engine_parameters, monkeypatch):
    """Counts what the engine would build, without a card's kernels."""
    at = "lmdeploy.pytorch.configurations.deepseek_v2.flash_mla_available"
    monkeypatch.setattr(at, lambda: False)
    return engine_parameters


@pytest.mark.lmdeploy
@pytest.mark.parametrize("name", [NAME, KIMI_NAME])
def test_parameters_are_the_engines(built, tmp_path, name):
    if name == NAME:
        folder, corrections = tiny(tmp_path / "m"), 0
    else:  # at 32 bits
        folder, corrections = tiny_kimi(tmp_path / "m", packing="")[0], 2 * 4 * 2
    model = resolve_model(str(folder))
    assert model.architecture == name
    assert built(folder) == model.parameters
    assert (model.weight_bytes, model.warnings) == (2 * model.parameters + corrections, ())


def packed_as(config):
    """Where LMDeploy builds a model of weights that are packed as this config says."""
    from lmdeploy.pytorch.config import QuantizationConfig
    from lmdeploy.pytorch.models.patch import BuildModelContext, build_model_context

    packing = QuantizationConfig.from_config(config)
    return build_model_context(BuildModelContext(quant_config=packing))


@pytest.mark.lmdeploy
def test_packed_experts_are_the_engines_and_not_of_deepseeks_class(built, tmp_path):
    from lmdeploy.hf_configs import config_from_pretrained

    folder, made = tiny_kimi(tmp_path / "m")
    with packed_as(config_from_pretrained(str(folder), trust_remote_code=False)):
        held = built(folder)
    assert held == sum(prod(shape) for _, _, shape in tensors(made))
    path = folder / "config.json"
    config = json.loads(path.read_text())["text_config"] | {"model_type": "deepseek_v3"}
    path.write_text(json.dumps(config))
    packed = SimpleNamespace(quantization_config=config["quantization_config"])
    with packed_as(packed), pytest.raises(ValueError, match="module prefix"):
        built(folder)
