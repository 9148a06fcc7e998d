"""Every model that LMDeploy lists is planned, or refused with its own reason and what to do."""

from __future__ import annotations

import json

import pytest

from bench.plans import registry as page
from turbofit.core.errors import UsageError
from turbofit.model.families.dims import (
    inner_refusal,
    named_refusal,
    purpose_refusal,
    refusal,
    unplanned,
)
from turbofit.model.families.engines import TURBOMIND_VISION
from turbofit.model.families.registry import VISION_READERS
from turbofit.model.families.text import TEXT_ARCHITECTURES, TURBOMIND_TEXT
from turbofit.model.presets import find_preset, known_presets
from turbofit.model.source import resolve_model
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

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
        ("deepseek-ai/deepseek-vl-7b-chat", "0.3.0 to 0.13.0 ran DeepSeek-VL", "Transformers"),
        ("MiniCPM-Llama3-V-2_5", "TurboMind of 0.5.0 to 0.13.0 ran it", "vLLM"),
        ("Molmo-7B-D", "TurboMind of 0.6.3 to 0.13.0 ran Molmo-7B-D, and 0.18 does not", ""),
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


@pytest.mark.parametrize(
    ("model", "needs"),
    [
        ("deepseek-ai/DeepSeek-V4", "9.0 or newer with room for 142 GB"),
        ("deepseek-ai/DeepSeek-V4-Pro", "9.0 or newer with room for 800 GB"),
        ("zai-org/GLM-5-FP8", "9.0 or newer with room for 744 GB"),
        ("deepseek-ai/DeepSeek-V3.2", "9.0 or newer with room for 671 GB"),
    ],
)
def test_a_model_without_an_account_is_sent_only_to_cards_that_run_it(
    model: str, needs: str
) -> None:
    with pytest.raises(UsageError) as refused:
        plan(PlanRequest.of(model=model, on="8xa100-80g"))
    assert f"runs it on cards of compute capability {needs}" in refused.value.hint
