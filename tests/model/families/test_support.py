"""Every model that LMDeploy lists is planned, or refused with its own reason and what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bench.plans import registry as page
from turbofit.core.errors import UsageError
from turbofit.model.families.engines import TURBOMIND_VISION
from turbofit.model.families.registry import VISION_READERS
from turbofit.model.families.support import inner_refusal, named_refusal, refusal, unplanned
from turbofit.model.families.text import TEXT_ARCHITECTURES, TURBOMIND_TEXT
from turbofit.model.presets import find_preset, known_presets
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

    def test_what_is_planned_is_listed(self, listed) -> None:
        assert PLANNED - listed["pytorch"] == FALLBACK_ALONE | SPELLINGS
        ours = TURBOMIND_TEXT | TURBOMIND_VISION
        assert ours <= listed["turbomind"]
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

    def test_deepseek_vl2_asks_for_a_transformers_that_lmdeploy_does_not_take(self) -> None:
        from importlib.metadata import requires

        from lmdeploy.vl.model.deepseek_vl2 import check_trans_version

        with pytest.raises(AssertionError, match=r"< 4\.48\.0"):
            check_trans_version()
        assert any(">=4.56.0" in need for need in requires("lmdeploy") or ())

    def test_minicpm_v_takes_no_image_to_its_engine(self) -> None:
        """Its front end fails at each image, and the engine's class would not read any."""
        import torch
        from lmdeploy.pytorch.models.minicpmv26 import MiniCPMVForCausalLM
        from lmdeploy.vl.model.minicpmv import MiniCPMVModel

        class Processor:
            max_slice_nums, use_image_id = 9, True

            def __call__(self, image, max_slice_nums):
                sizes = torch.tensor([1, 1])
                return {"pixel_values": [[torch.zeros(3, 14, 14)]], "tgt_sizes": [[sizes]]}

            def get_sliced_grid(self, image_size, max_slice_nums):
                return None

        front = MiniCPMVModel.__new__(MiniCPMVModel)
        front.version, front.image_token_id, front.image_processor = "2.6", 0, Processor()
        front._preprocess_func = front._preprocess_v2_6
        template = SimpleNamespace(messages2prompt=lambda messages, **_: messages[0]["content"])
        image = SimpleNamespace(size=(14, 14))
        content = [{"type": "text", "text": "a"}, {"type": "image", "data": image}]
        messages = front.preprocess([{"role": "user", "content": content}])
        with pytest.raises(AssertionError):
            front.to_pytorch(messages, template, None)
        assert not hasattr(MiniCPMVForCausalLM, "get_input_processor")


def test_no_architecture_is_planned_and_refused_or_refused_twice() -> None:
    names = [name for one in unplanned() for name in one.architectures]
    assert len(names) == len(set(names))
    assert not PLANNED & set(names)


@pytest.mark.parametrize("family", unplanned(), ids=lambda one: one.name)
def test_each_has_a_reason_of_its_own_and_something_to_do(family) -> None:
    for name in family.architectures:
        error = refusal(name)
        assert family.name in error.message
        assert error.hint
    for name in family.names:
        error = named_refusal(name)
        assert error is not None
        assert error.message == family.refusal().message, name


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("MiniCPM-V-2_6", "every image ends in", "vLLM runs it"),
        ("allenai/Molmo-7B-D-0924", "written for 4.43", "vLLM runs it"),
        ("pixtral", "does not run Pixtral", "vLLM runs it"),
        ("Kimi_K25ForConditionalGeneration", "does not run Kimi-K2.5 in Transformers' own", "K2.6"),
        ("Phi-4-multimodal-instruct", "does not run Phi-4-multimodal", "vLLM and Transformers"),
        ("gemma-3n-E4B-it", "does not run Gemma 3n", "vLLM and Transformers"),
        ("rednote-hilab/dots.mocr", "does not run dots.ocr", "vLLM runs it"),
        ("GOT-OCR2_0", "does not run GOT-OCR2", "GOT-OCR-2.0-hf"),
        ("MinerU2.0-2505-0.9B", "does not run MinerU2.0", "MinerU2.5"),
    ],
)
def test_a_name_gets_its_answer(typed: str, message: str, hint: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError) as caught:
        resolve_model(typed)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "did you mean" not in caught.value.hint


@pytest.mark.parametrize("name", ["gemma-4b", "minicpm", "ovisual", "deepseek-r1", "zzzz"])
def test_other_names_are_not_taken_for_one(name: str) -> None:
    assert named_refusal(name) is None


def test_no_preset_is_refused_by_name() -> None:
    for one in unplanned():
        assert not [name for name in one.names if find_preset(name)]
    assert not [name for name in known_presets() if named_refusal(name)]


def test_what_is_inside_is_named() -> None:
    assert "SDAR" in inner_refusal("InternVLChatModel", "SDARForCausalLM").message
    assert "--backend pytorch" in inner_refusal("X", "DeepseekV32ForCausalLM").hint
    assert "Nope inside" in inner_refusal("X", "Nope").message
