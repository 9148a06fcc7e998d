"""The table of Transformers beside LMDeploy: what it says of versions, tried ones and others."""

from __future__ import annotations

import pytest

from turbofit.memory.versions import parse
from turbofit.model.families.engines import TURBOMIND_UNPLANNED, TURBOMIND_VISION
from turbofit.model.families.registry import VISION_READERS
from turbofit.planning.compatibility import EFFECTS, FrontEnd, compatibility

LLAVA = FrontEnd("0.18", "LlavaForConditionalGeneration", "pytorch")
QWEN3 = FrontEnd("0.18.0", "Qwen3VLForConditionalGeneration", "pytorch")


def test_the_table_covers_what_was_promised() -> None:
    table = compatibility()
    assert table.lmdeploy == ("0.16", "0.17", "0.18")
    tried = [parse(one) for one in table.transformers]
    assert tried == sorted(tried)
    assert len(tried) >= 8
    assert "bench/compatibility" in table.source
    native = TURBOMIND_VISION | TURBOMIND_UNPLANNED
    assert native <= set(table.families["turbomind"])
    elsewhere = {"LlavaOnevisionForConditionalGeneration", "MllamaForConditionalGeneration"}
    remote = {"Phi3VForCausalLM", "ChatGLMForConditionalGeneration"}
    assert set(VISION_READERS) - elsewhere - remote <= set(table.families["pytorch"])


def test_every_failure_is_of_something_tried() -> None:
    table = compatibility()
    for one in table.failures:
        assert {one.first, one.last} <= set(table.transformers)
        assert parse(one.first) <= parse(one.last)
        assert set(one.lmdeploy) <= set(table.lmdeploy)
        assert set(one.architectures) <= set(table.families[one.engine])
        assert one.step in EFFECTS
        assert ": " in one.error


@pytest.mark.parametrize("version", ["5.0.0", "5.17.0", "5.12.9", "6.0", "99.1.0"])
def test_what_fails_fails_between_and_beyond(version: str) -> None:
    failure = LLAVA.failure(version)
    assert failure is not None
    assert failure.step == "image"
    assert "size of tensor" in failure.error


@pytest.mark.parametrize("version", ["4.50.3", "4.55.0", "4.57.6", "4.57.9", "4.40.0"])
def test_what_runs_is_no_failure(version: str) -> None:
    assert LLAVA.failure(version) is None


def test_between_what_runs_and_what_fails_nobody_knows() -> None:
    assert QWEN3.failure("4.56.2") is not None
    assert QWEN3.failure("4.57.0") is None  # 4.57.6 runs
    assert QWEN3.failure("4.57.6") is None
    assert QWEN3.failure("4.40.0") is not None


def test_requirements_are_the_newest_that_run() -> None:
    assert LLAVA.requirement() == "transformers<5"
    assert QWEN3.requirement() == "transformers>=4.57.6"
    moe = FrontEnd("0.18", "Qwen3VLMoeForConditionalGeneration", "pytorch")
    assert moe.failure("4.57.6") is None
    assert moe.requirement() == "transformers>=5.3.0"
    next_ = FrontEnd("0.18", "LlavaNextForConditionalGeneration", "pytorch")
    assert next_.failure("4.57.6") is not None
    assert next_.requirement() is None
    text = FrontEnd("0.18", "LlamaForCausalLM", "turbomind")
    assert text.failure("4.50.3") is text.requirement() is None


def test_another_lmdeploy_has_the_nearest_older_ones_rows() -> None:
    assert LLAVA._replace(lmdeploy="0.19.1").failure("5.17.0") is not None
    assert LLAVA._replace(lmdeploy="0.13.0").failure("5.17.0") is None
    assert LLAVA._replace(lmdeploy="0.13.0").requirement() is None


def test_nested_configs_that_stay_dicts() -> None:
    """lmdeploy#3786: a config class that cannot be made without arguments is given up silently."""
    for engine in ("turbomind", "pytorch"):
        front = FrontEnd("0.18", "InternVLChatModel+training", engine)
        failure = front.failure("5.17.0")
        assert failure is not None
        assert failure.error == "AttributeError: 'dict' object has no attribute 'hidden_size'"
    assert FrontEnd("0.18", "InternVLChatModel", "turbomind").failure("5.17.0") is None
