"""Every model that LMDeploy lists is planned, or refused with its own reason and what to do."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from bench.plans import registry as page
from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.model.families.dims import (
    inner_refusal,
    named_refusal,
    purpose_refusal,
    refusal,
    unplanned,
)
from turbofit.model.families.engines import TURBOMIND_VISION, engine_problem
from turbofit.model.families.registry import VISION_READERS
from turbofit.model.families.text import TEXT_ARCHITECTURES, TURBOMIND_TEXT
from turbofit.model.presets import find_preset, known_presets, preset_model
from turbofit.model.source import resolve_model

PLANNED = TEXT_ARCHITECTURES | set(VISION_READERS)
#: Planned for Transformers, since no engine of LMDeploy 0.18 has a class for them.
FALLBACK_ALONE = {
    "Idefics3ForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
    "MllamaForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel",
    "Qwen2_5OmniThinkerForConditionalGeneration", "SmolVLMForConditionalGeneration",
}  # fmt: skip
#: LMDeploy's list has another name than the published checkpoints.
SPELLINGS = {"ChatGLMModel"}


@pytest.fixture(scope="module")
def listed(transformers) -> dict[str, frozenset[str]]:
    """LMDeploy's own registries: the architectures that each lists."""
    return page.listed()._asdict()


class TestLmdeploysRegistries:
    pytestmark = pytest.mark.lmdeploy

    def test_each_architecture_is_planned_or_refused_by_name(self, listed) -> None:
        known = {name for one in unplanned() for name in one.architectures} | PLANNED
        for registry, names in listed.items():
            assert names, registry
            assert names - known == set(), registry
        assert PLANNED - listed["pytorch"] == FALLBACK_ALONE | SPELLINGS
        assert listed["turbomind"] >= TURBOMIND_TEXT | TURBOMIND_VISION
        assert set(VISION_READERS) - listed["images"] == FALLBACK_ALONE

    def test_the_engine_that_is_named_lists_it(self, listed) -> None:
        """TurboMind where that lists it; what LMDeploy lists and cannot start has a reason."""
        for one in unplanned():
            for name in one.architectures:
                if one.engine is None:
                    assert name not in listed["turbomind"]
                    assert name not in listed["pytorch"] or one.why, name
                else:
                    assert name in listed[one.engine], name
                    assert (one.engine == "turbomind") is (name in listed["turbomind"]), name


def test_nothing_is_planned_and_refused_or_refused_twice() -> None:
    names = [name for one in unplanned() for name in one.architectures]
    assert len(names) == len(set(names))
    assert not PLANNED & set(names)
    assert not [name for one in unplanned() for name in one.names if find_preset(name)]
    others = ("gemma-4b", "minicpm", "ovisual", "deepseek-r1", "zzzz")
    assert not [name for name in (*known_presets(), *others) if named_refusal(name)]


def test_each_has_a_reason_of_its_own_and_something_to_do() -> None:
    for family in unplanned():
        for name in family.architectures:
            error = refusal(name)
            assert family.name in error.message
            assert error.hint, name
        for name in family.names:
            error = named_refusal(name)
            assert error is not None, name
            assert error.message == family.refusal().message, name


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("MiniCPM-V-2_6", "every image ends in", "vLLM runs it"),
        ("allenai/Molmo-7B-D-0924", "written for 4.43", "vLLM runs it"),
        ("Kimi_K25ForConditionalGeneration", "does not run Kimi-K2.5 in Transformers' own", "K2.6"),
        ("gemma-3n-E4B-it", "does not run Gemma 3n", "vLLM and Transformers"),
        ("rednote-hilab/dots.mocr", "does not run dots.ocr", "vLLM runs it"),
        ("Qwen/Qwen3-Embedding-8B", "models of embeddings", "vLLM"),
        ("Qwen/Qwen3-VL-Reranker-2B", "rerankers, which score", "vLLM"),
        ("nvidia/NV-Embed-v2", "models of embeddings", "vLLM"),
        ("BAAI/bge-reranker-v2-m3", "rerankers, which score", "vLLM"),
        ("MinerU2.0-2505-0.9B", "does not run MinerU2.0", "MinerU2.5"),
        ("deepseek-ai/deepseek-vl-7b-chat", "older releases ran DeepSeek-VL", "Transformers"),
        ("StarCoder2-7B", "older releases ran it, and 0.18 does not", "vLLM"),
        ("Intern-S2-Mobius", "share packs of experts", ""),
        ("shanghai/Intern-S2-Mobius-397B", "share packs of experts", ""),
    ],
)
def test_a_name_gets_its_answer(typed: str, message: str, hint: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError) as caught:
        resolve_model(typed)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "did you mean" not in caught.value.hint


@pytest.mark.parametrize("name", ["Qwen3-Embedding-8B", "Qwen3-Reranker-4B", "gte-qwen2-7b"])
def test_a_folder_of_an_embedder_is_told_by_its_name(name: str, tmp_path) -> None:
    """Its config.json is a chat model's."""
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"LMDeploy .* does not run (models of emb|rerankers)"):
        resolve_model(str(tmp_path / name))
    assert purpose_refusal("/models/embed/Qwen3-8B/") is None
    assert purpose_refusal("Qwen/Qwen3-8B") is None


def test_what_is_inside_is_named() -> None:
    assert "SDAR" in inner_refusal("InternVLChatModel", "SDARForCausalLM").message
    assert "Nope inside" in inner_refusal("X", "Nope").message


# What LMDeploy's tables do not say by themselves.


ENGINES = ("turbomind", "pytorch", "transformers")
RUNS = {
    "internvl2-8b": "turbomind pytorch",
    "internvl2-4b": "pytorch",
    "internvl3-8b-hf": "turbomind pytorch transformers",
    "qwen2-vl-7b": "turbomind pytorch transformers",
    "qwen2-vl-7b-awq": "turbomind pytorch",
    "qwen3-vl-8b": "pytorch transformers",
    "qwen3.5-9b": "turbomind pytorch transformers",
    "qwen3.5-27b-gptq-int4": "turbomind",  # it leaves gated delta nets
    "qwen3.5-35b-a3b": "turbomind pytorch transformers",
    "llava-1.5-7b": "pytorch transformers",
    "llava-v1.6-mistral-7b": "transformers",
    "llava-onevision-7b": "transformers",
    "llama-3.2-11b-vision": "transformers",
    "cogvlm-17b": "pytorch",
    "glm-4v-9b": "pytorch",
    "glm-4.1v-9b": "pytorch transformers",
    "gemma-3-4b": "pytorch transformers",
    "phi-3.5-vision": "pytorch",
    "llama-4-scout": "pytorch transformers",
    "intern-s1-pro": "pytorch",
    "kimi-k2.5": "pytorch",
    "qwen2.5-omni-7b": "transformers",
    "qwen3-omni-30b-a3b": "pytorch",
    "internlm2.5-7b": "turbomind pytorch",
    "llama-3.1-8b": "turbomind pytorch transformers",
    "gpt-oss-20b": "turbomind",
    "gpt-oss-20b-bf16": "turbomind pytorch",
    "glm-4.5-air": "pytorch",
    "phi-3.5-moe": "pytorch",
    "deepseek-moe-16b": "pytorch",
    "minicpm3-4b": "pytorch",
    "qwen3-next-80b-a3b": "pytorch",
    "deepseek-v3": "pytorch",
    "glm-4.7-flash": "turbomind pytorch",
}


@pytest.mark.parametrize(("name", "engines"), RUNS.items())
def test_engines_of_presets(name, engines):
    model = preset_model(name)
    assert [e for e in ENGINES if engine_problem(model, e) is None] == engines.split()
    for engine in ENGINES:
        problem = engine_problem(model, engine)
        assert problem is None or 20 < len(problem) < 120


FP8 = Quantization(method="fp8", bits=8, group_size=128)
AWQ = Quantization(method="awq", bits=4, group_size=128)
GPTQ = Quantization(method="gptq", bits=4, group_size=128)


@pytest.mark.parametrize(
    ("name", "engine", "packed", "words"),
    [
        ("kimi-k2.5", "transformers", None, "latent attention"),
        ("intern-s1-pro", "transformers", None, "own code"),
        ("qwen3-omni-30b-a3b", "transformers", None, "no account"),
        ("qwen2.5-omni-7b", "pytorch", None, "no engine"),
        ("llama-4-scout", "turbomind", None, "encoder"),
        ("internvl2-4b", "turbomind", None, "would not fall back"),
        ("llama-4-scout", "pytorch", FP8, "fp8"),
        ("phi-3.5-moe", "pytorch", FP8, "in 16 bits only"),
        ("deepseek-moe-16b", "pytorch", FP8, "in 16 bits only"),
        ("minicpm3-4b", "pytorch", FP8, "in 16 bits only"),
        ("qwen3-omni-30b-a3b", "pytorch", FP8, "take 16 bits"),
        # LMDeploy's loader: KeyError 'multi_modal_projector.linear_1.weight'; fp8 it packs itself.
        ("internvl3-8b-hf", "pytorch", AWQ, "projector"),
        ("internvl3-8b-hf", "pytorch", FP8, None),
        ("intern-s1-mini", "pytorch", AWQ, "projector"),
        ("intern-s1-mini", "turbomind", AWQ, None),
        ("internvl3-8b", "pytorch", AWQ, None),
        # Its loader of Qwen2.5-0.5B in fp8: shape '[-1, 3, 2, 1]' is invalid for size 49.
        ("qwen2.5-0.5b", "turbomind", FP8, "heads"),
        ("llama-3.2-1b", "turbomind", FP8, None),
        ("qwen3.5-9b", "turbomind", GPTQ, "widen gptq"),
    ],
)
def test_reasons(name, engine, packed, words):
    model = preset_model(name)
    if packed is not None:
        model = replace(model, quantization=packed)
    problem = engine_problem(model, engine)
    assert problem is None if words is None else words in problem


@pytest.mark.parametrize(
    ("method", "bits", "group", "turbomind", "pytorch"),
    [
        ("awq", 4, 128, True, True), ("awq", 4, 64, False, True), ("gptq", 4, 128, True, False),
        ("compressed-tensors", 4, 32, True, False), ("fp8", 8, 128, True, True),
    ],
)  # fmt: skip
def test_quantised_weights(method, bits, group, turbomind, pytorch):
    plain = preset_model("qwen2.5-7b")
    model = replace(plain, quantization=Quantization(method=method, bits=bits, group_size=group))
    assert (engine_problem(model, "turbomind") is None) is turbomind
    assert (engine_problem(model, "pytorch") is None) is pytorch
    assert "further packages" in engine_problem(model, "transformers")


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"hidden": 960}, "the hidden size's 960 channels"),
        ({"heads": 15, "head_dim": 192}, "the heads' 2880 channels"),
        ({"intermediate": 2624}, "the MLP's 2624 channels"),
        ({"intermediate": 29568}, None),
    ],
)
def test_turbomind_takes_whole_groups(method, dims, words):
    """On pretend GPUs: "K % 128 == 0 … got K=960", "shape '[1024, 20, -1]' is invalid"."""
    model = preset_model("llama-3.1-8b")
    packed = Quantization(method=method, bits=4, group_size=128)
    model = replace(model, text=replace(model.text, **dims), quantization=packed)
    problem = engine_problem(model, "turbomind")
    assert (problem is None) if words is None else (words in problem)
    exempt = replace(packed, unconverted=("mlp.down_proj", "o_proj", "mlp.up_proj"))
    assert engine_problem(replace(model, quantization=exempt), "turbomind") is None


def test_dims_that_turbomind_lacks():
    model = preset_model("qwen2-vl-7b")
    model = replace(model, vision=replace(model.vision, heads=10))
    assert "64 or 80" in engine_problem(model, "turbomind")
    assert engine_problem(model, "pytorch") is None
    model = preset_model("qwen3.5-9b")
    narrow = replace(model.text, delta=replace(model.text.delta, key_dim=64))
    assert "128 channels" in engine_problem(replace(model, text=narrow), "turbomind")
