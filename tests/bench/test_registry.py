"""The page of LMDeploy's registries says what turbofit answers now, for what LMDeploy lists now."""

from __future__ import annotations

import re

import pytest

from bench.plans import registry as page

ROWS = dict(re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", page.OUT.read_text(), re.MULTILINE))


def test_the_page_has_the_answers_of_now() -> None:
    assert {architecture: page.answer(architecture) for architecture in ROWS} == ROWS


def test_the_page_has_what_is_planned() -> None:
    """What LMDeploy does not list at all is planned for Transformers, and not on the page."""
    assert page.PLANNED - set(ROWS) == {
        "Idefics3ForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
        "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel",
        "Qwen2_5OmniThinkerForConditionalGeneration", "SmolVLMForConditionalGeneration",
    }  # fmt: skip


@pytest.mark.lmdeploy
def test_the_page_has_what_the_installed_lmdeploy_lists() -> None:
    assert page.table() == page.OUT.read_text()
