"""The page of LMDeploy's registries says what turbofit answers now, for what LMDeploy lists now."""

from __future__ import annotations

import re

import pytest

from bench.plans import registry as page
from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml
from turbofit.model.presets import find_preset
from turbofit.model.source import resolve_model

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


def test_quantised_models_of_this_year_are_presets_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = page.OUT.with_name("SERVED.md").read_text()
    names = load_yaml(page.OUT.with_name("served.yaml"))["models"]
    refused = []
    for name in names:
        assert f"| `{name}` |" in said
        if find_preset(name) is None:
            with pytest.raises(UsageError, match=r"does not (run|account for)") as caught:
                resolve_model(name)
            assert caught.value.message in said
            refused.append(name)
    assert len(names) - len(refused) >= 20
    assert sum("not account for" not in line for line in said.splitlines()) - 12 >= 30


@pytest.mark.lmdeploy
def test_the_page_has_what_the_installed_lmdeploy_lists() -> None:
    assert page.table() == page.OUT.read_text()
