"""Qwen3.5, Qwen3-Next and Intern-S2: parameters, states and image tokens against their classes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.oracles import (
    check_cache,
    check_images,
    count,
    delta_nets,
    front_end,
    qwen3_5_of,
    read,
    text_config,
    with_processor,
    without_fla,
    written,
)
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule, VideoRule
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.header_only import write_header
from turbofit.rehearse.checkpoint.twin import config_of, tensors, twin_of, write_model

FAMILIES = ["Qwen3_5", "Qwen3_5Moe"]
PRESETS = [
    "qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3.6-27b", "qwen3.6-35b-a3b",
]  # fmt: skip
BF16 = "lmdeploy.pytorch.configurations.qwen3_5.is_bf16_supported"


@pytest.mark.parametrize("preset", PRESETS)
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
    from tests.support.checkpoints import write_safetensors

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
    with pytest.raises(UsageError, match="2 x heads x head_dim"):
        resolve_model(str(tmp_path / "m"))


@pytest.mark.lmdeploy
class TestLmdeploy:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("seed", range(3))
    def test_model_is_built_whole(
        self, transformers, engine_parameters, tmp_path, monkeypatch, family, seed
    ):  # fmt: skip
        without_fla(monkeypatch, "qwen3_5")
        monkeypatch.setattr(BF16, lambda *_: True)
        config = qwen3_5_of(transformers, random.Random(f"engine{family}{seed}"), family)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        config.text_config.update({"bos_token_id": 0, "eos_token_id": 1})
        written(transformers, config, tmp_path / "m")
        assert engine_parameters(tmp_path / "m") == resolve_model(str(tmp_path / "m")).parameters

    @pytest.mark.parametrize("tp", [1, 2])
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("seed", range(4))
    def test_states_and_blocks_are_the_engines(self, transformers, monkeypatch, family, seed, tp):
        from lmdeploy.pytorch.configurations.qwen3_5 import Qwen3_5ModelConfigBuilder

        monkeypatch.setattr(BF16, lambda *_: True)
        config = qwen3_5_of(transformers, random.Random(f"state{family}{seed}"), family)
        config.text_config.update({"bos_token_id": 0, "eos_token_id": 1})
        text = read(config).text
        made = Qwen3_5ModelConfigBuilder.build(config, tp=tp)
        check_cache(made, text, tp)

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
            frames, wide, high = (
                rng.randrange(2, 12),
                rng.randrange(33, 400),
                rng.randrange(33, 400),
            )
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


NEXT = "Qwen3NextForCausalLM"


def next_of(transformers, seed):
    rng = random.Random(seed)
    values = text_config(rng) | delta_nets(rng) | {"num_hidden_layers": 8, "head_dim": 8}
    values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
    values |= {"shared_expert_intermediate_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.Qwen3NextConfig(**values, pad_token_id=0)
    config.architectures = [NEXT]
    # Which Transformers 5 drops where it made layer_types of it.
    config.full_attention_interval = values["full_attention_interval"]
    return config


@pytest.mark.lmdeploy
class TestLmdeploysNext:
    @pytest.mark.parametrize("seed", range(3))
    def test_model_is_built_whole(
        self, transformers, engine_parameters, tmp_path, monkeypatch, seed
    ):  # fmt: skip
        without_fla(monkeypatch, "qwen3_next")
        config = next_of(transformers, seed)
        config.mlp_only_layers = [seed]
        written(transformers, config, tmp_path / "m")
        model = resolve_model(str(tmp_path / "m"))
        assert model.text.moe.layers == 7
        assert engine_parameters(tmp_path / "m") == model.parameters

    @pytest.mark.parametrize("tp", [1, 2])
    @pytest.mark.parametrize("seed", range(3))
    def test_states_and_blocks_are_the_engines(self, transformers, tmp_path, seed, tp):
        from lmdeploy.pytorch.configurations.qwen3_next import Qwen3NextModelConfigBuilder

        config = next_of(transformers, seed)
        written(transformers, config, tmp_path / "m")
        text = resolve_model(str(tmp_path / "m")).text
        made = Qwen3NextModelConfigBuilder.build(config, tp=tp)
        check_cache(made, text, tp)

    def test_a_config_as_published_does_not_start_with_transformers_5(self, transformers, tmp_path):
        """What known-bad.yaml says; with layer_types beside it, the interval stays."""
        from lmdeploy.hf_configs import config_from_pretrained
        from lmdeploy.pytorch.configurations.qwen3_next import Qwen3NextModelConfigBuilder

        published = {"architectures": [NEXT], "model_type": "qwen3_next", "bos_token_id": 0}
        published |= {"eos_token_id": 1, "num_hidden_layers": 4, "full_attention_interval": 4}
        kinds = ["linear_attention"] * 3 + ["full_attention"]
        for added, starts in (({}, transformers.__version__[0] < "5"), ({"layer_types": kinds}, 1)):
            (tmp_path / "config.json").write_text(json.dumps(published | added))
            config = config_from_pretrained(str(tmp_path), trust_remote_code=False)
            if starts:
                assert Qwen3NextModelConfigBuilder.build(config).num_layers == 1
                continue
            with pytest.raises(AttributeError, match="full_attention_interval"):
                Qwen3NextModelConfigBuilder.build(config)


S2 = "InternS2PreviewForConditionalGeneration"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Its published number of tokens; four layers with eight experts."""
    model = preset_model("qwen3.5-35b-a3b")
    moe, delta = model.text.moe, model.text.delta
    assert moe is not None
    assert delta is not None
    text = replace(
        model.text, layers=4, vocab=251_392, moe=replace(moe, layers=4, experts=8),
        delta=replace(delta, layers=3),
    )  # fmt: skip
    twin = twin_of(replace(model, text=text, name="Intern-S2-Preview", architecture=S2))
    made = write_model(twin, tmp_path / "Intern-S2-Preview")
    for part in made.glob("model*"):
        part.unlink()
    unread = [
        ("model.time_series.encoder.conv1.weight", "BF16", (768, 80, 3)),
        ("time_series_forecaster.head.weight", "BF16", (768, 768)),
        ("mtp.fc.weight", "BF16", (2048, 4096)),
    ]
    write_header(made / "model.safetensors", [*tensors(twin), *unread])
    return made


def test_it_is_read_as_qwen3_5_without_its_time_series(folder: Path) -> None:
    model = resolve_model(str(folder))
    like = preset_model("qwen3.5-35b-a3b")
    assert (model.architecture, model.text.architecture) == (S2, like.text.architecture)
    assert (model.vision, model.warnings) == (like.vision, ())
    assert model.image_rule is not None
    assert model.image_rule.videos
    assert model.weight_bytes == 2 * model.parameters


@pytest.mark.parametrize("name", ["Intern-S2-Mobius", "shanghai/Intern-S2-Mobius-397B"])
def test_its_relative_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match="share packs of experts"):
        resolve_model(name)
