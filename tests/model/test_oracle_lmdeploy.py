"""LMDeploy's own preprocessing, loaders and PyTorch model classes against what turbofit reads.

Classes are built without memory: for families whose model is remote code they are the only ones to
count by. Kernels need a GPU's libraries and are left out; they hold no weights.
"""

from __future__ import annotations

import json
import random
from functools import partial

import pytest
from msgspec.structs import replace

from tests.support.checkpoints import make_internvl2, make_internvl_hf, make_qwen2_vl, make_text
from tests.support.checkpoints_eva import make_cogvlm, make_glm4v
from tests.support.checkpoints_llava import make_llava
from tests.support.oracles import (
    check_images,
    config_class,
    front_end,
    gemma_of,
    glm,
    glm_of,
    picture,
    qwen3,
    qwen3_of,
    text_config,
    tokens_of,
    written,
)
from turbofit.core.images import PatchRule
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import checkpoint_for

pytestmark = pytest.mark.lmdeploy


def check_tokens(folder, rule, side, knobs=({},)):
    """LMDeploy's front end counts as many tokens of random images, with one of the knobs each."""
    rng = random.Random(4)
    cases = [
        ((rng.randrange(8, side), rng.randrange(8, side)), rng.choice(knobs)) for _ in range(10)
    ]
    found = tokens_of(folder, [(picture(*size), asked) for size, asked in cases])
    assert found == [replace(rule, **asked).tokens(*size) for size, asked in cases]


def test_internvl_image_tokens(transformers, tmp_path):
    folder = make_internvl2(tmp_path / "InternVL2-1B", max_dynamic_patch=7)
    knobs = [{"max_dynamic_patch": most} for most in (1, 3, 4)]
    check_tokens(folder, resolve_model(str(folder)).image_rule, 900, [{}, *knobs])


def test_qwen_image_tokens(transformers, tmp_path):
    folder = make_qwen2_vl(tmp_path / "Qwen2-VL-2B-Instruct", max_pixels=400_000)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_heads"] = 1  # heads of 64, as TurboMind needs
    (folder / "config.json").write_text(json.dumps(config))
    check_tokens(folder, resolve_model(str(folder)).image_rule, 1500)


@pytest.mark.parametrize("preset", ["mineru2.5-pro-1.2b", "intern-s1-mini"])
def test_images_of_presets_are_counted_as_lmdeploy_does(transformers, tmp_path, preset):
    model = preset_model(preset)
    rule, folder = model.image_rule, tmp_path / "twin"
    checkpoint_for(model, folder)
    if isinstance(rule, PatchRule):
        path = folder / "preprocessor_config.json"
        bounds = {"min_pixels": rule.min_pixels, "max_pixels": rule.max_pixels}
        path.write_text(json.dumps(json.loads(path.read_text()) | bounds))
    check_tokens(folder, rule, 2600)


@pytest.mark.parametrize("make", [qwen3, glm])
def test_patches_reach_the_engine_as_planned(transformers, tmp_path, make):
    folder = tmp_path / "tiny"
    token = make(transformers, folder)
    rule = resolve_model(str(folder)).image_rule
    # What would lower or raise the limit elsewhere is not read here.
    check_images(front_end(folder), rule, f"a{token}b", max_pixels=784, min_pixels=1)


cogvlm2 = partial(make_cogvlm, second=True)
llava_next = partial(make_llava, kind="llava_next")
#: Keys that published configs spell out and the engine reads without a default.
_PUBLISHED = {"bos_token_id": 0, "eos_token_id": 1, "norm_topk_prob": True}
_SCALING = {"rope_type": "linear", "factor": 8.0}
MAKERS = [
    make_internvl2, make_internvl_hf, make_qwen2_vl, make_text, make_llava, llava_next,
    make_cogvlm, cogvlm2, make_glm4v,
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_parameters_are_the_engines(engine_parameters, tmp_path, make):
    folder = make(tmp_path / "tiny")
    model = resolve_model(str(folder))
    assert engine_parameters(folder) == model.parameters
    buffers = 32 if make is make_glm4v else 0  # bytes of inv_freq
    assert (model.weight_bytes, model.warnings) == (2 * model.parameters + buffers, ())


@pytest.mark.parametrize("make", [gemma_of, qwen3_of])
def test_families_of_transformers_are_built_whole(transformers, engine_parameters, tmp_path, make):
    config = make(transformers, random.Random(4))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config.text_config.update(_PUBLISHED)
    if make is gemma_of:
        config.text_config.rope_parameters["full_attention"] |= _SCALING
    written(transformers, config, tmp_path / "m")
    assert engine_parameters(tmp_path / "m") == resolve_model(str(tmp_path / "m")).parameters


def test_glm_is_built_from_a_flat_config_alone(transformers, engine_parameters, tmp_path):
    config = glm_of(transformers, random.Random(4))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config.text_config.update(_PUBLISHED)
    written(transformers, config, tmp_path / "m")
    nested = resolve_model(str(tmp_path / "m"))
    assert "text_config" in nested.warnings[0]
    with pytest.raises(AttributeError, match="Glm4vConfig"):
        engine_parameters(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    own = {key: value for key, value in values.pop("text_config").items() if key != "model_type"}
    values |= {"pad_token_id": 0, "attention_bias": True}
    path.write_text(json.dumps({**own, **values}))
    model = resolve_model(str(tmp_path / "m"))
    assert (model.text, model.warnings) == (nested.text, ())
    # The engine builds a bias a layer that no checkpoint has.
    more = model.vision.layers * model.vision.hidden
    assert engine_parameters(tmp_path / "m") == model.parameters + more


def test_phi3_inside_an_internvl_runs_there_alone(engine_parameters, tmp_path):
    folder = make_internvl2(tmp_path / "InternVL2-4B")
    (folder / "model.safetensors").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["llm_config"] |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    config["llm_config"] |= {"pad_token_id": 0}
    path.write_text(json.dumps(config))
    assert engine_parameters(folder) == resolve_model(str(folder)).parameters


@pytest.mark.parametrize(
    ("make", "tokens"), [(make_cogvlm, 1227), (cogvlm2, 2306), (make_glm4v, 1602)]
)
def test_every_image_is_a_square(transformers, tmp_path, make, tokens):
    folder = make(tmp_path / "tiny")
    model = resolve_model(str(folder))
    sizes = [(30, 900), (490, 490), (1, 1), (2000, 100)]
    assert [model.image_rule.tokens(*size) for size in sizes] == [tokens] * 4
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer.pop("auto_map", None)  # the code of a tokenizer that is not here
    path.write_text(json.dumps(tokenizer))
    assert tokens_of(folder, [(picture(*size), {}) for size in sizes]) == [tokens] * 4
    assert model.image_rule.worst_units() == 1
    assert model.needs_remote_code


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Phi3", "Gemma2", "Gemma3", "Glm4"])
def test_text_models_are_built_whole(transformers, engine_parameters, tmp_path, family):
    values = text_config(random.Random(family)) | {"tie_word_embeddings": False, "pad_token_id": 0}
    if family in {"Gemma2", "Gemma3", "Glm4"}:
        values["head_dim"] = 8
    config = config_class(transformers, family)(**values, **_PUBLISHED)
    config.architectures = [f"{family}ForCausalLM"]
    if family == "Gemma3":
        config.rope_parameters["full_attention"] |= _SCALING
    written(transformers, config, tmp_path / "m")
    model = resolve_model(str(tmp_path / "m"))
    assert engine_parameters(tmp_path / "m") == model.parameters
    assert (engine_problem(model, "turbomind") is None) is (family == "Llama")
    assert engine_problem(model, "pytorch") is engine_problem(model, "transformers") is None
