"""Qwen-Omni, Qwen3.5 and Qwen3-Next against Transformers' classes and LMDeploy's."""

from __future__ import annotations

import json
import math
import random
from importlib import import_module

import pytest
from msgspec.structs import replace

from tests.support.front_ends import CHECKPOINTS
from tests.support.oracles import (
    check_cache,
    check_images,
    count,
    delta_nets,
    front_end,
    picture,
    qwen3_5_of,
    qwen3_tower,
    read,
    text_config,
    with_processor,
    without_fla,
    written,
)
from tests.support.safetensors_file import write_safetensors
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule, VideoRule
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import config_of, twin_of

THINKER = "Qwen2_5OmniThinkerForConditionalGeneration"
QWEN3 = "Qwen3OmniMoeForConditionalGeneration"
OMNI = ["Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration", THINKER, QWEN3]
SPEECH = {
    "talker.model.norm.weight": ("BF16", (64,)),
    "token2wav.code2wav_dit_model.norm.weight": ("F32", (1 << 20,)),
    "code2wav.decoder.0.conv.weight": ("BF16", (8, 8, 3)),
}


def parts_of(rng, name):
    """``thinker_config`` with random dims."""
    text = text_config(rng)
    heads = rng.choice([1, 2])
    vision = {
        "depth": rng.randrange(1, 4), "num_heads": heads, "hidden_size": heads * 8,
        "intermediate_size": rng.randrange(5, 60), "out_hidden_size": text["hidden_size"],
        "patch_size": rng.choice([4, 14]),
    }  # fmt: skip
    audio = {
        "encoder_layers": rng.randrange(1, 4), "d_model": heads * 8,
        "encoder_attention_heads": heads, "encoder_ffn_dim": rng.randrange(5, 60),
        "num_mel_bins": rng.choice([16, 80, 128]), "output_dim": text["hidden_size"],
        "max_source_positions": 40,
    }  # fmt: skip
    tied = rng.random() < 0.5
    if name == QWEN3:
        text |= {"head_dim": 8, "attention_bias": tied, "decoder_sparse_step": 1}
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
        vision, tied = qwen3_tower(rng, text), False
        audio["downsample_hidden_size"] = rng.randrange(4, 30)
    return {
        "text_config": text, "vision_config": vision, "audio_config": audio,
        "tie_word_embeddings": tied,
    }  # fmt: skip


def config_file(parts, name):
    """config.json of a checkpoint of this class."""
    inner = parts if name == THINKER else {"thinker_config": parts}
    return json.dumps({"architectures": [name], "dtype": "bfloat16", **inner})


def thinker_of(transformers, parts, name):
    """The thinker's config and its parameters by name; tied ones once."""
    import torch

    kind = "Qwen3OmniMoe" if name == QWEN3 else "Qwen2_5Omni"
    config = getattr(transformers, f"{kind}ThinkerConfig")(**parts)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ThinkerForConditionalGeneration")(config)
    return config, {key: tuple(value.shape) for key, value in model.named_parameters()}


@pytest.mark.parametrize("name", OMNI)
def test_defaults_are_transformers(transformers, name):
    parts = {"vision_config": {"num_heads": 16, "hidden_size": 1280}}
    if name == QWEN3:
        parts = {
            "text_config": {"num_attention_heads": 32, "head_dim": 128},
            "vision_config": {"out_hidden_size": 2048}, "audio_config": {"output_dim": 2048},
        }  # fmt: skip
    model = read(config_file(parts, name))
    config, shapes = thinker_of(transformers, parts, name)
    assert model.parameters == sum(map(math.prod, shapes.values()))
    assert model.text.max_position_embeddings == config.text_config.max_position_embeddings


@pytest.mark.parametrize("name", OMNI)
@pytest.mark.parametrize("seed", range(4))
def test_what_speaks_is_not_counted(transformers, tmp_path, name, seed):
    parts = parts_of(random.Random(f"{name}{seed}"), name)
    _, shapes = thinker_of(transformers, parts, name)
    prefix, speech = ("", {}) if name == THINKER else ("thinker.", SPEECH)
    stored = {f"{prefix}{key}": ("BF16", shape) for key, shape in shapes.items()}
    write_safetensors(tmp_path / "model.safetensors", stored | speech)
    (tmp_path / "config.json").write_text(config_file(parts, name))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    model = resolve_model(str(tmp_path))
    assert model.weight_bytes == 2 * model.parameters == 2 * sum(map(math.prod, shapes.values()))
    assert model.text.tie_word_embeddings is parts["tie_word_embeddings"]
    assert model.vision.audio is not None
    assert model.dtype == "bfloat16"
    assert not model.warnings
    parts["text_config"]["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(config_file(parts, name))
    with pytest.raises(UsageError, match="says"):
        resolve_model(str(tmp_path))


@pytest.mark.lmdeploy
def test_image_tokens_reach_the_engine_as_planned(transformers, tmp_path):
    """Under the checkpoint's bounds, and under those of a request."""
    folder = CHECKPOINTS[QWEN3](tmp_path / "m")
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
        found = front.preprocess([{"role": "user", "content": [item]}], "a<|image_pad|>b", asked)
        assert found["input_ids"].count(front.image_token_id) == rule.tokens(*size, limit)


FAMILIES = ["Qwen3_5", "Qwen3_5Moe"]
QWEN3_5_PRESETS = [
    "qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3.6-27b", "qwen3.6-35b-a3b",
]  # fmt: skip
BF16 = "lmdeploy.pytorch.configurations.qwen3_5.is_bf16_supported"


@pytest.mark.parametrize("preset", QWEN3_5_PRESETS)
def test_presets_are_built_by_transformers(transformers, preset):
    model = preset_model(preset)
    config = transformers.AutoConfig.for_model(**config_of(twin_of(model)))
    assert count(transformers, model.architecture, config) == model.parameters
    found = read(config)
    assert (found.text, found.vision) == (model.text, model.vision)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("qwen3.5-27b", 27_781_427_952), ("qwen3.6-27b", 27_781_427_952),
        ("qwen3.5-35b-a3b", 35_951_822_704), ("qwen3.6-35b-a3b", 35_951_822_704),
        ("qwen3-next-80b-a3b", 81_324_862_720),
    ],
)  # fmt: skip
def test_the_hub_counts_one_layer_more(preset, count):
    """The draft: a layer with attention, a projection of two hidden states, three norms."""
    model = preset_model(preset)
    text, moe = model.text, model.text.moe
    query, key = text.heads * text.head_dim, text.kv_heads * text.head_dim
    attention = text.hidden * (3 * query + 2 * key) + 2 * text.head_dim
    mlp = 3 * text.hidden * text.intermediate
    if moe:
        mlp = (moe.experts + 1) * (3 * moe.intermediate + 1) * text.hidden
    assert model.parameters + attention + mlp + (2 * text.hidden + 5) * text.hidden == count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_of_further_tokens_is_no_surplus(transformers, tmp_path, family):
    config = qwen3_5_of(transformers, random.Random(7), family)
    tensors = written(transformers, config, tmp_path / "m")
    plain = resolve_model(str(tmp_path / "m"))
    assert plain.warnings == ()
    draft = {"mtp.fc.weight": ("BF16", (32, 64)), "mtp.layers.0.norm.weight": ("BF16", (32,))}
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors | draft)
    model = resolve_model(str(tmp_path / "m"))
    assert (model.warnings, model.parameters) == ((), plain.parameters)
    config.text_config.head_dim += 1
    (tmp_path / "m" / "config.json").write_text(config.to_json_string(use_diff=False))
    with pytest.raises(UsageError, match="parameters, but the weights hold"):
        resolve_model(str(tmp_path / "m"))


QWEN3_NEXT = "Qwen3NextForCausalLM"


def delta_net_of(transformers, family, seed):
    """A config with gated delta nets, of random dims."""
    rng = random.Random(f"{family}{seed}")
    if family != "Qwen3Next":
        config = qwen3_5_of(transformers, rng, family)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        config.text_config.update({"bos_token_id": 0, "eos_token_id": 1})
        return config
    values = text_config(rng) | delta_nets(rng) | {"num_hidden_layers": 8, "head_dim": 8}
    values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
    values |= {"shared_expert_intermediate_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.Qwen3NextConfig(**values, pad_token_id=0)
    config.architectures, config.mlp_only_layers = [QWEN3_NEXT], [seed]
    # Which Transformers 5 drops where it made layer_types of it.
    config.full_attention_interval = values["full_attention_interval"]
    return config


@pytest.mark.lmdeploy
class TestLmdeploy:
    @pytest.mark.parametrize("family", [*FAMILIES, "Qwen3Next"])
    @pytest.mark.parametrize("seed", range(4))
    def test_model_states_and_blocks_are_the_engines(
        self, transformers, engine_parameters, tmp_path, monkeypatch, family, seed
    ):  # fmt: skip
        module = "qwen3_next" if family == "Qwen3Next" else "qwen3_5"
        without_fla(monkeypatch, module)
        monkeypatch.setattr(BF16, lambda *_: True)
        config = delta_net_of(transformers, family, seed)
        written(transformers, config, tmp_path / "m")
        model = resolve_model(str(tmp_path / "m"))
        assert family != "Qwen3Next" or model.text.moe.layers == 7
        assert engine_parameters(tmp_path / "m") == model.parameters
        builders = import_module(f"lmdeploy.pytorch.configurations.{module}")
        builder = getattr(builders, f"{family.removesuffix('Moe')}ModelConfigBuilder")
        for tp in (1, 2):
            check_cache(builder.build(config, tp=tp), model.text, tp)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_image_tokens_reach_the_engine_as_planned(self, transformers, tmp_path, family):
        import numpy as np

        config = qwen3_5_of(transformers, random.Random(2), family)
        config.vision_config.patch_size = 16
        written(transformers, config, tmp_path / "m")
        size = {"shortest_edge": 65_536, "longest_edge": 400_000}
        with_processor(
            tmp_path / "m", "Qwen3VL",
            {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size, "patch_size": 16,
             "temporal_patch_size": 2, "merge_size": 2},
        )  # fmt: skip
        rule = resolve_model(str(tmp_path / "m")).image_rule
        assert rule == PatchRule(
            patch_size=16, merge=2, min_pixels=65_536, max_pixels=400_000, client_knobs=False,
            video=VideoRule(merged_frames=2, min_pixels=65_536, max_pixels=400_000),
        )  # fmt: skip
        front = front_end(tmp_path / "m")
        assert type(front).__name__ == "Qwen3_5Model"
        check_images(front, rule, "a<|image_pad|>b", max_pixels=784)
        rng = random.Random(6)
        for _ in range(12):
            frames = rng.randrange(2, 12)
            wide, high = rng.randrange(33, 400), rng.randrange(33, 400)
            asked = {"max_pixels": rng.randrange(20_000, 500_000), "min_pixels": 1000}
            video = np.zeros((frames, high, wide, 3), np.uint8)
            seen = {
                "fps": 10.0, "total_num_frames": frames, "duration": frames / 10,
                "frames_indices": list(range(frames)),
            }  # fmt: skip
            item = {"type": "video", "data": video, "video_metadata": seen}
            found = front.preprocess(
                [{"role": "user", "content": [item]}], "a<|video_pad|>b", {"video": asked}
            )
            count = rule.videos.units(frames, wide, high, **asked)
            assert found["input_ids"].count(front.video_token_id) == rule.unit_tokens(count)
            assert len(found["multimodal"]) == rule.videos.grids(frames)
            assert sum(one["pixel_values_videos"].shape[0] for one in found["multimodal"]) == count
