"""LMDeploy's own PyTorch model classes, built without memory, against the parameters read.

For the families whose model is remote code this is the only class to count by: Transformers has
none. Kernels need a GPU's libraries and are left out; they hold no weights.
"""

from __future__ import annotations

import json
import random

import pytest

from tests.support.checkpoints import make_internvl2, make_internvl_hf, make_qwen2_vl, make_text
from tests.support.checkpoints_eva import make_cogvlm, make_glm4v
from tests.support.checkpoints_llava import make_llava
from tests.support.oracles import (
    config_class,
    gemma_of,
    glm_of,
    picture,
    qwen3_of,
    text_config,
    tokens_of,
    written,
)
from turbofit.model.families.engines import engine_problem
from turbofit.model.source import resolve_model

pytestmark = pytest.mark.lmdeploy


def cogvlm2(folder):
    return make_cogvlm(folder, second=True)


def llava_next(folder):
    return make_llava(folder, "llava_next")


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
    model = resolve_model(str(tmp_path / "m"))
    assert engine_parameters(tmp_path / "m") == model.parameters


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
    model = resolve_model(str(folder))
    assert engine_parameters(folder) == model.parameters
    assert "would not fall back" in engine_problem(model, "turbomind")
    assert engine_problem(model, "pytorch") is None
    assert "only the checkpoint's own code" in engine_problem(model, "transformers")


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
    assert engine_problem(model, "pytorch") is None
    assert engine_problem(model, "turbomind")
    assert engine_problem(model, "transformers")


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
