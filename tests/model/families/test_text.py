"""Language models and towers that published checkpoints store in a way of their own."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.checkpoints import make_internvl2, write_checkpoint
from tests.support.tiny_checkpoints import LLAMA, read
from tests.sweep import part
from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.presets import load_yaml
from turbofit.core.struct import to_builtins
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig
from turbofit.model.families.engines import engine_problem
from turbofit.model.families.registry import VISION_READERS, read_dims
from turbofit.model.families.text import TEXT_ARCHITECTURES, read_text
from turbofit.model.presets import known_presets, preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import (
    config_of,
    tensors,
    twin_of,
    write_header,
    write_model,
)

S2 = "InternS2PreviewForConditionalGeneration"


@pytest.mark.parametrize(
    ("preset", "layers", "dense", "unread"),
    [
        ("gpt-oss-20b", 3, 0, []), ("gpt-oss-20b-bf16", 3, 0, []),
        ("glm-4.5", 3, 1, [("model.layers.3.eh_proj.weight", "BF16", (5120, 2 * 5120))]),
        ("deepseek-v2-lite", 3, 1, [("model.layers.3.eh_proj.weight", "BF16", (8, 8))]),
        ("qwen3-next-80b-a3b", 4, 0, [("mtp.fc.weight", "BF16", (2048, 4096))]),
        (S2, 4, 0, [
            ("model.time_series.encoder.conv1.weight", "BF16", (768, 80, 3)),
            ("time_series_forecaster.head.weight", "BF16", (768, 768)),
            ("mtp.fc.weight", "BF16", (2048, 4096)),
        ]),
    ],
)  # fmt: skip
def test_a_checkpoint_of_few_layers_is_read_whole(tmp_path, preset, layers, dense, unread):
    """As it is published: sinks, biases and packed experts; corrections and what drafts.

    Intern-S2 is Qwen3.5 with tensors of time series.
    """
    if preset == S2:
        model = replace(preset_model("qwen3.5-35b-a3b"), name="Intern-S2-Preview", architecture=S2)
    else:
        model = preset_model(preset)
    moe, delta = model.text.moe, model.text.delta
    text = replace(
        model.text, layers=layers, moe=replace(moe, layers=layers - dense),
        delta=delta and replace(delta, layers=3),
    )  # fmt: skip
    twin = twin_of(replace(model, text=text))
    folder = write_model(twin, tmp_path / "m")
    if unread:
        for part in folder.glob("model*"):
            part.unlink()
        write_header(folder / "model.safetensors", [*tensors(twin), *unread], {})
    read = resolve_model(str(folder))
    assert (read.architecture, read.text, read.vision) == (model.architecture, text, model.vision)
    assert read.quantization == model.quantization
    assert not read.warnings
    assert bool(read.image_rule and read.image_rule.videos) is (preset == S2)
    # At 16 bits but for the corrections' 32; what drafts is not counted.
    corrections = (layers - dense) * moe.experts * 2 if moe.correction else 0
    if model.quantization is None:
        stored = sum(read.tensor_bytes.values())
        assert read.weight_bytes == stored == 2 * read.parameters + corrections


MODEL_TYPES = {
    "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
WINDOWS: list[tuple[str, dict[str, object], int]] = [
    ("mistral", {}, 4096),
    ("mistral", {"sliding_window": None}, 0),
    ("mistral", {"sliding_window": 1024}, 1024),
    ("mixtral", {}, 0),
    ("mixtral", {"sliding_window": 4096}, 4096),
    ("qwen2", {"sliding_window": 4096}, 0),
    ("qwen2", {"use_sliding_window": True}, 4096),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 32}, 0),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 4096),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 31}, 512),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1}, 4096),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 0}, 0),
    ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 99}, 4096),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "keys", "window"), WINDOWS)
def test_a_sliding_window_is_read_as_transformers_has_it(transformers, kind, keys, window):
    text = read_text(Section({"num_hidden_layers": 32, **keys}, "config.json"), MODEL_TYPES[kind])
    assert text.window == window
    # No document of a model without a window has the field.
    assert ("sliding_window" in to_builtins(text)) == bool(window)
    made = transformers.AutoConfig.for_model(kind, num_hidden_layers=32, **keys)
    kinds = getattr(made, "layer_types", None) or ["sliding_attention"]
    assert (made.sliding_window or 0 if "sliding_attention" in kinds else 0) == window


@pytest.mark.parametrize(
    ("change", "sparse", "turbomind"),
    [
        ({}, 3, True), ({"decoder_sparse_step": 2, "mlp_only_layers": []}, 2, False),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, 3, False),
        ({"decoder_sparse_step": 3, "mlp_only_layers": []}, 1, False),
        ({"mlp_only_layers": [0, 1, 2, 3]}, None, False),
    ],
)  # fmt: skip
def test_dense_layers_among_experts(change, sparse, turbomind):
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 4} | change
    config.setdefault("mlp_only_layers", [0, 9])
    if sparse is None:
        with pytest.raises(UsageError):
            read(config=config)
        return
    model = read(config=config)
    assert model.text.moe.layers == sparse
    problem = engine_problem(model, "turbomind")
    assert problem is None if turbomind else "sparse" in problem
    assert engine_problem(model, "pytorch") is None


def internvl(tmp_path, part=None, **changes):
    """A folder of InternVL2 whose config, or a part of it, is changed."""
    folder = make_internvl2(tmp_path / "InternVL2-1B")
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (None, {"ps_version": "v1"}), (None, {"force_image_size": 224}),
        (None, {"downsample_ratio": 0.3}), (None, {"llm_config": None}),
        (None, {"vision_config": None}), (None, {"max_dynamic_patch": 10**9}),
        (None, {"max_dynamic_patch": "12"}), (None, {"use_thumbnail": 1}),
        ("llm_config", {"architectures": []}),
        ("llm_config", {"architectures": ["DeepseekV4ForCausalLM"]}),
        ("vision_config", {"norm_type": "group_norm"}),
        ("vision_config", {"num_attention_heads": 5}), ("vision_config", {"image_size": 450}),
        ("vision_config", {"num_hidden_layers": 3}), ("vision_config", {"hidden_size": 128}),
    ],
)  # fmt: skip
def test_internvl_that_would_not_run(tmp_path, part, changes):
    with pytest.raises(UsageError):
        resolve_model(internvl(tmp_path, part, **changes))


def test_images_are_tiled_where_there_is_no_preprocessor(tmp_path):
    """LMDeploy looks at dynamic_image_size only where a preprocessor config is there too."""
    folder = internvl(tmp_path, dynamic_image_size=False)
    assert resolve_model(folder).image_rule.dynamic
    (tmp_path / "InternVL2-1B" / "preprocessor_config.json").write_text("{}")
    assert not resolve_model(folder).image_rule.dynamic


SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 20,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 14,
    "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "pad_token_id": 0,
}  # fmt: skip
PRESETS = [
    "deepseek-v2-lite", "glm-4.7-flash", "phi-3.5-moe", "deepseek-moe-16b", "minicpm3-4b",
]  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_checkpoint_is_read_as_its_preset(name: str, tmp_path: Path) -> None:
    found, preset = resolve_model(str(write_checkpoint(name, tmp_path))), preset_model(name)
    assert (found.text, found.parameters, found.warnings) == (preset.text, preset.parameters, ())


def omni(part: str, **change: object) -> dict[str, object]:
    return {"thinker_config": {part: change}}


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("Gemma3", {"mm_tokens_per_image": 25}, "25 does not pool 14 x 14"),
        ("Gemma3", {"vision_config": {"vision_use_head": True}}, "pooling head"),
        ("Gemma3", {"vision_config": {"patch_size": 999}}, "does not pool 0 x 0"),
        ("Mllama", {"vision_config": {"vision_output_dim": 7681}}, "not 6 times 1280"),
        ("Mllama", {"vision_config": {"attention_heads": 7}}, "does not divide"),
        ("Mllama", {"vision_config": {"max_num_tiles": 0}}, "not within 1..256"),
        ("Qwen2_5Omni", omni("audio_config", output_dim=64), "output_dim"),
        ("Qwen2_5Omni", omni("audio_config", encoder_attention_heads=3), "does not divide"),
        ("Qwen2_5Omni", omni("vision_config", out_hidden_size=63), "out_hidden_size"),
        ("MiniCPM3", {"q_lora_rank": None}, "q_lora_rank is null"),
        ("MiniCPM3", {"v_head_dim": 32}, "v_head_dim is not 64"),
        ("MiniCPM3", {"num_key_value_heads": 8}, "num_key_value_heads is not 40"),
        ("MiniCPM3", {"num_attention_heads": 39, "num_key_value_heads": 39}, "39 does not divide"),
        ("DeepseekV2", SMALL | {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("DeepseekV2", SMALL | {"moe_layer_freq": 2}, "dense layers behind the first"),
        ("DeepseekV2", SMALL | {"mlp_layer_types": ["sparse", "dense", *["sparse"] * 3]},
         "behind the first"),
    ],
)  # fmt: skip
def test_configs_that_no_engine_runs_or_that_contradict_themselves(family, config, said):
    kind = "CausalLM" if family in {"MiniCPM3", "DeepseekV2"} else "ConditionalGeneration"
    with pytest.raises(UsageError, match=said):
        read(config={"architectures": [f"{family}For{kind}"], **config})


# Every family reads any config, or refuses it as a user's error.


GOLDEN = Path(__file__).parents[3] / "bench/golden/checkpoints.yaml"
ARCHITECTURES = sorted({*TEXT_ARCHITECTURES, *VISION_READERS})


@cache
def bases():
    """A config for each architecture: golden ones, stand-ins' of presets, those of one reader."""
    found = {}
    for name in known_presets():
        with suppress(UsageError):
            model = preset_model(name)
            found[model.architecture] = config_of(twin_of(model))
    for files in load_yaml(GOLDEN).values():
        match files.get("config"):
            case {"architectures": [str(name)]} as config:
                found.setdefault(name, config)
    readers = {VISION_READERS.get(name): config for name, config in found.items()}
    return {
        name: found.get(name) or readers.get(VISION_READERS.get(name), LLAMA)
        for name in ARCHITECTURES
    }


@cache
def keys():
    return sorted({str(key) for base in bases().values() for key in keys_of(base)})


def keys_of(value):
    """All keys of a config and its sections."""
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from keys_of(inner)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats()
    | st.sampled_from(ARCHITECTURES) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=10,
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=part(300, 10))
@given(st.data(), st.sampled_from(ARCHITECTURES), VALUES, VALUES)
def test_fuzzed_configs_raise_nothing_else(data, architecture, processor, tokenizer):
    config = copy.deepcopy(bases()[architecture]) | {"architectures": [architecture]}
    sections = [config, *(part for part in config.values() if isinstance(part, dict))]
    changes = st.dictionaries(st.sampled_from(keys()), VALUES, max_size=5)
    data.draw(st.sampled_from(sections)).update(data.draw(changes))
    files = {"preprocessor_config": processor, "tokenizer_config": tokenizer}
    try:
        model = read(config=config, **files)
    except TurbofitError:
        return
    assert model.parameters > 0
    assert model.weight_bytes > 0
    for engine in ("turbomind", "pytorch", "transformers"):
        engine_problem(model, engine)
    if model.image_rule is not None:
        for size in ((1, 1), (640, 480), (100, 10_000)):
            most = model.image_rule.worst_units()
            assert 1 <= model.image_rule.units(*size) <= most
            assert model.image_rule.tokens(*size) <= model.image_rule.unit_tokens(most)


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(("inner", "outer"), [(TIED, {}), ({}, TIED)])
def test_either_config_ties_the_head(inner, outer):
    """Transformers before 5 wrote it into the text_config alone."""
    text = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, **inner}
    config = {"text_config": text, "vision_config": {"hidden_size": 896}, **outer}
    section = Section(config, "config.json")
    dims = read_dims(CheckpointConfig(section, "Qwen2VLForConditionalGeneration", None, []))
    assert dims.text.tie_word_embeddings
