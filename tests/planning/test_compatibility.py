"""The table of Transformers beside LMDeploy: what it says of versions, tried ones and others."""

from __future__ import annotations

from turbofit.memory.versions import parse
from turbofit.model.families.engines import TURBOMIND_VISION
from turbofit.model.families.registry import VISION_READERS
from turbofit.planning.compatibility import EFFECTS, FrontEnd, compatibility
from turbofit.planning.examine.packages import satisfies

LLAVA = FrontEnd("0.18", "LlavaForConditionalGeneration", "pytorch")
QWEN3 = FrontEnd("0.18.0", "Qwen3VLForConditionalGeneration", "pytorch")


def test_the_table_covers_what_was_promised() -> None:
    table = compatibility()
    assert list(table.transformers) == ["0.16", "0.17", "0.18"]
    for versions in table.transformers.values():
        tried = [parse(one) for one in versions]
        assert tried == sorted(tried)
        assert len(tried) >= 8
    assert "bench/compatibility" in table.source
    native = TURBOMIND_VISION
    remote = {
        "Phi3VForCausalLM", "ChatGLMForConditionalGeneration", "InternS1ForConditionalGeneration",
        "InternS1ProForConditionalGeneration", "InternS1_1_ForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration", "KimiK25ForConditionalGeneration",
    }  # fmt: skip
    assert native - remote <= set(table.families["turbomind"])
    elsewhere = {
        "Idefics3ForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
        "MllamaForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniModel", "Qwen2_5OmniThinkerForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    }  # fmt: skip
    assert set(VISION_READERS) - elsewhere - remote <= set(table.families["pytorch"])


def test_every_failure_is_of_something_tried() -> None:
    table = compatibility()
    for one in table.failures:
        for lmdeploy in one.lmdeploy:
            assert {one.first, one.last} <= set(table.transformers[lmdeploy])
        assert parse(one.first) <= parse(one.last)
        known = {*table.families[one.engine], "InternVLChatModel+training"}
        assert set(one.architectures) <= known
        assert one.step in EFFECTS
        assert ": " in one.error


def test_what_fails_fails_between_too_and_between_what_runs_and_what_fails_nobody_knows() -> None:
    for version in ("5.0.0", "5.17.0", "5.12.9"):
        failure = LLAVA.failure(version)
        assert failure.step == "image"
        assert "size of tensor" in failure.error
    assert LLAVA.failure("4.99.0") is None  # 4.57.6 runs, 5.0.0 does not
    assert QWEN3.failure("4.56.2") is not None
    assert QWEN3.failure("4.57.0") is None  # 4.57.6 runs
    assert QWEN3.failure("4.57.6") is None
    assert QWEN3.failure("4.40.0") is not None
    next_ = FrontEnd("0.18", "LlavaNextForConditionalGeneration", "pytorch")
    assert next_.failure("4.57.6") is not None
    assert FrontEnd("0.18", "LlamaForCausalLM", "turbomind").failure("4.50.3") is None


def test_requirements_are_what_runs_newest_first() -> None:
    newer, older = LLAVA.requirements()
    assert newer.startswith("transformers>=5.2")
    assert older == "transformers<5"
    for name, required in (
        ("Qwen3VLForConditionalGeneration", ("transformers>=4.57.6",)),
        ("Glm4vForConditionalGeneration", ("transformers<=5.19.0",)),
        ("LlavaNextForConditionalGeneration", ()),
        ("LlamaForCausalLM", ()),
    ):
        assert FrontEnd("0.18", name, "pytorch").requirements() == required


def test_each_requirement_names_versions_that_run_alone() -> None:
    table = compatibility()
    fronts = [FrontEnd("0.18", name, engine) for engine in table.families
              for name in table.families[engine]]  # fmt: skip
    for front in fronts:
        newest = max(front.tested_versions(), key=parse)
        for requirement in front.requirements():
            bounds = requirement.removeprefix("transformers")
            named = [v for v in front.tested_versions() if satisfies(v, bounds)]
            named = [v for v in named if v not in table.outside]
            assert named
            assert not [v for v in named if front.failure(v)], (front, requirement)
            assert front.failure(newest) is None or "<" in requirement


def test_nested_configs_that_stay_dicts() -> None:
    """lmdeploy#3786: a config class that cannot be made without arguments is given up silently."""
    for engine in ("turbomind", "pytorch"):
        front = FrontEnd("0.18", "InternVLChatModel+training", engine)
        error = front.failure("5.17.0").error
        assert error == "AttributeError: 'dict' object has no attribute 'hidden_size'"
        assert front.failure("5.23.0") is None
    assert FrontEnd("0.18", "InternVLChatModel", "turbomind").failure("5.17.0") is None
