"""Transformers' own classes: their tensors are explained to the element, and their defaults read.

What a checkpoint stores is held by its header, so that a sum that agrees is the parameters' number.
"""

from __future__ import annotations

import json
import random
from functools import partial

import pytest
from msgspec.structs import replace

from tests.support.checkpoints import write_tokenizer
from tests.support.oracles import (
    count,
    gemma_of,
    glm_of,
    idefics_of,
    llava_of,
    mllama_of,
    picture,
    qwen3_5_of,
    qwen3_of,
    read,
    shapes_near,
    text_config,
    tokens_of,
    written,
)
from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.images import CanvasRule, HdRule
from turbofit.core.model import Model
from turbofit.model.parameters import text_parameters
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import twin_of, write_model


def llama_of(transformers, rng):
    text = text_config(rng) | {"intermediate_size_mlp": rng.randrange(5, 60), "head_dim": 8}
    text |= {"num_local_experts": rng.choice([2, 4]), "pad_token_id": 0}
    text |= {"interleave_moe_layer_step": rng.choice([1, 2]), "num_hidden_layers": 4}
    text |= {"attention_bias": rng.random() < 0.5, "use_qk_norm": rng.random() < 0.5}
    heads = rng.choice([1, 2])
    wide = rng.choice([16, 24])
    vision = {
        "num_hidden_layers": rng.randrange(1, 4), "num_attention_heads": heads,
        "hidden_size": heads * 8, "intermediate_size": heads * 32, "image_size": 56,
        "patch_size": 14, "projector_input_dim": wide, "projector_output_dim": wide,
        "vision_output_dim": wide,
    }  # fmt: skip
    config = transformers.Llama4Config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        architectures=["Llama4ForConditionalGeneration"],
    )
    config.text_config.tie_word_embeddings = False
    return config


def qwen_vl_of(transformers, rng, family):
    text = text_config(rng)
    heads = rng.choice([1, 2])
    hidden = heads * rng.choice([64, 80])
    vision = {
        "depth": rng.randrange(1, 4), "num_heads": heads, "patch_size": rng.choice([4, 14]),
        "temporal_patch_size": rng.choice([1, 2]), "spatial_merge_size": rng.choice([1, 2]),
    }  # fmt: skip
    if family == "Qwen2VL":
        vision |= {"embed_dim": hidden, "hidden_size": text["hidden_size"], "mlp_ratio": 3}
    else:
        vision |= {"hidden_size": hidden, "out_hidden_size": text["hidden_size"]}
        vision |= {"intermediate_size": rng.randrange(5, 99)}
    return getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=rng.random() < 0.5,
        architectures=[f"{family}ForConditionalGeneration"],
    )


def internvl_of(transformers, rng):
    text = text_config(rng) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    heads = rng.choice([1, 2, 5])
    side = rng.choice([28, 56])
    vision = {
        "hidden_size": heads * 16, "num_hidden_layers": rng.randrange(1, 4),
        "num_attention_heads": heads, "intermediate_size": rng.randrange(5, 99),
        "image_size": [side, side], "patch_size": [14, 14], "attention_bias": rng.random() < 0.5,
        "use_qk_norm": rng.random() < 0.5, "norm_type": rng.choice(["layer_norm", "rms_norm"]),
    }  # fmt: skip
    return transformers.InternVLConfig(
        text_config=text, vision_config=vision, image_seq_length=(side // 28) ** 2,
        tie_word_embeddings=False, architectures=["InternVLForConditionalGeneration"],
    )  # fmt: skip


FAMILIES = {
    "Gemma3": gemma_of, "Idefics3": idefics_of, "SmolVLM": partial(idefics_of, kind="SmolVLM"),
    "Llava": llava_of, "Llava of SigLIP": partial(llava_of, tower="siglip"),
    "LlavaNext": partial(llava_of, family="LlavaNext"),
    "LlavaOnevision": partial(llava_of, family="LlavaOnevision", tower="siglip"),
    "Mllama": mllama_of, "Glm4v": glm_of, "Qwen3VL": qwen3_of,
    "Qwen3VLMoe": partial(qwen3_of, family="Qwen3VLMoe"), "Qwen3_5": qwen3_5_of,
    "Qwen3_5Moe": partial(qwen3_5_of, family="Qwen3_5Moe"), "Llama4": llama_of,
    "Qwen2VL": partial(qwen_vl_of, family="Qwen2VL"), "InternVL": internvl_of,
    "Qwen2_5_VL": partial(qwen_vl_of, family="Qwen2_5_VL"),
}  # fmt: skip


def checkpoint_of(transformers, family, seed, folder):
    """A header-only checkpoint of random dims, and its config."""
    config = FAMILIES[family](transformers, random.Random(f"{family}{seed}"))
    written(transformers, config, folder)
    if family == "Llama4":
        processor = {"size": {"height": 56, "width": 56}, "max_patches": 9}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(part(5, 3)))
def test_every_element_is_explained(transformers, tmp_path, family, seed):
    config = checkpoint_of(transformers, family, seed, tmp_path / "m")
    model = resolve_model(str(tmp_path / "m"))
    assert model.weight_bytes == 2 * model.parameters
    assert not model.warnings or family == "Glm4v"
    assert not model.needs_remote_code
    if family == "Llama4":
        assert model.image_rule == rule_of(9, 56)
    if family in {"Qwen2VL", "Qwen2_5_VL"}:
        assert model.text.tie_word_embeddings is config.tie_word_embeddings


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


PRESETS = ["phi-3.5-moe", "deepseek-moe-16b", "minicpm3-4b"]


def cut(name: str, layers: int) -> Model:
    """The first layers of a preset."""
    model = preset_model(name)
    text, moe = model.text, model.text.moe
    if moe is not None:
        moe = replace(moe, layers=layers - (text.layers - moe.layers))
    return replace(model, text=replace(text, layers=layers, moe=moe))


@pytest.mark.lmdeploy
class TestLmdeploy:
    @pytest.mark.parametrize(("name", "layers"), list(zip(PRESETS, (2, 3, 2), strict=True)))
    def test_models_are_built_whole(self, engine_parameters, tmp_path, name, layers):
        from lmdeploy.hf_configs import config_from_pretrained
        from lmdeploy.pytorch.configurations.minicpm3 import MiniCPM3ModelConfigBuilder

        model = cut(name, layers)
        text, folder = model.text, write_model(twin_of(model), tmp_path)
        counted = engine_parameters(folder)
        if text.tie_word_embeddings:  # it ties them when it has loaded them
            counted -= text.vocab * text.hidden
        assert counted == text_parameters(text)
        if name == "minicpm3-4b":  # it caches what its latents expand to
            made = MiniCPM3ModelConfigBuilder.build(config_from_pretrained(str(folder)), tp=1)
            assert made.num_key_value_heads == text.kv_heads
            assert made.k_head_dim == made.v_head_dim == text.head_dim


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
    rule = pages(crops)
    assert rule.tokens(1770, 1180) == tokens
    assert rule.tokens(336, 336 * crops) == rule.unit_tokens(crops + 1)


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
        found = made.hd_feature_transform(features, [(336 * rows, 336 * columns)]).shape[0]
        assert pages(rows * columns).tokens(336 * columns, 336 * rows) == found


@pytest.mark.lmdeploy
def test_parameters_are_the_engines(engine_parameters, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4}))
    model = resolve_model(str(tmp_path))
    assert engine_parameters(tmp_path) == model.parameters
    assert model.image_rule == pages(4)
    assert model.needs_remote_code


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


TOKENS = (
    "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)  # fmt: skip


def rule_of(most: int, side: int = 336) -> CanvasRule:
    return CanvasRule(
        tile_size=side, tokens_per_tile=(side // 28) ** 2 + 1, max_dynamic_patch=most
    )  # fmt: skip


@pytest.mark.parametrize(("most", "side"), [(16, 336), (5, 336), (1, 336), (13, 56)])
def test_canvases_are_transformers(transformers, most, side):
    import torch
    from transformers.image_utils import SizeDict
    from transformers.models.llama4.image_processing_llama4 import (
        find_supported_resolutions,
        get_best_fit,
    )

    rule = rule_of(most, side)
    square = SizeDict(height=side, width=side)
    canvases = torch.tensor(find_supported_resolutions(max_num_chunks=most, patch_size=square))
    worst = 0
    for width, height in shapes_near(side, 700):
        rows, columns = (int(n) // side for n in get_best_fit((height, width), canvases))
        expected = rows * columns + (rows * columns > 1)
        assert rule.units(width, height) == expected, (width, height)
        worst = max(worst, expected)
    assert worst == rule.worst_units() == (most + 1 if most > 1 else 1)


@pytest.mark.lmdeploy
class TestLlama4:
    @pytest.mark.parametrize("seed", range(3))
    def test_model_is_built_whole(self, transformers, engine_parameters, tmp_path, seed):
        config = checkpoint_of(transformers, "Llama4", seed, tmp_path / "m")
        # The engine builds norms of heads that no checkpoint has, where there is a rotation.
        own = config.text_config
        rotated = sum(1 for layer in range(own.num_hidden_layers) if (layer + 1) % 4)
        more = rotated * own.head_dim if own.use_qk_norm else 0
        found = engine_parameters(tmp_path / "m")
        assert found == resolve_model(str(tmp_path / "m")).parameters + more

    def test_image_tokens_reach_the_engine_as_planned(self, transformers, tmp_path):
        folder = tmp_path / "m"
        checkpoint_of(transformers, "Llama4", 3, folder)
        write_tokenizer(folder, TOKENS)
        values = {
            "image_processor_type": "Llama4ImageProcessorFast", "max_patches": 7,
            "processor_class": "Llama4Processor", "size": {"height": 56, "width": 56},
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
        rule = resolve_model(str(folder)).image_rule
        rng = random.Random(5)
        found = [(rng.randrange(5, 600), rng.randrange(5, 600)) for _ in range(12)]
        seen = tokens_of(folder, [(picture(*size), {"max_patches": 99}) for size in found])
        assert seen == [rule.tokens(*size) for size in found]
