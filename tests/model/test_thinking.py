"""Which models think before they answer."""

from __future__ import annotations

import pytest

from turbofit.core.plan import THINKING_TOKENS
from turbofit.model.presets import preset_model
from turbofit.model.thinking import thinks
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve


@pytest.mark.parametrize(
    ("preset", "thinking"),
    [
        ("qwen3-8b", True), ("qwen3-30b-a3b", True), ("qwen3.5-9b", True), ("qwen3.5-2b", False),
        ("qwen3-vl-8b", False), ("qwen3-coder-next", False), ("qwen3-omni-30b-a3b-thinking", True),
        ("glm-4.1v-9b", True), ("glm-4.5-air", True), ("gpt-oss-20b", True), ("qwen2-vl-7b", False),
        ("internvl3.5-8b", False), ("internvl2-8b", False), ("llama-3.1-8b", False),
    ],
)  # fmt: skip
def test_a_preset_thinks_by_its_name(preset: str, thinking: bool) -> None:
    assert preset_model(preset).thinks is thinking


def test_a_template_says_more_than_a_name() -> None:
    off = "{%- if enable_thinking is defined and enable_thinking is false %}"
    on = "{%- if enable_thinking is defined and enable_thinking is true %}"
    assert thinks("mine", off)
    assert not thinks("Qwen/Qwen3-8B", on)


@pytest.mark.parametrize(
    ("model", "given", "tokens"),
    [
        ("qwen3-8b", {}, THINKING_TOKENS),
        ("qwen3-8b", {"output_tokens": 9}, 9),
        ("qwen2.5-7b", {}, 256),
    ],
)
def test_answers_of_a_model_that_thinks_are_longer(model, given, tokens) -> None:
    request = PlanRequest.of(model=model, on="1xl4", **given)
    assert resolve(request).workload.output_tokens == tokens
