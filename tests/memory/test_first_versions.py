"""Which release of LMDeploy first ran a model."""

from __future__ import annotations

from typing import Any

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml, preset_path
from turbofit.memory import first_versions
from turbofit.memory.engines import engine_for
from turbofit.memory.first_versions import not_yet
from turbofit.memory.versions import is_legacy
from turbofit.model.presets import preset_model


@pytest.mark.parametrize(
    ("model", "version", "engine"),
    [
        ("qwen3-8b", "0.7.3", "turbomind"),
        ("qwen3-8b", "0.7", "turbomind"),  # some 0.7.x does
        ("qwen3-8b", "v0.8.0.post1", "turbomind"),
        ("qwen3-8b", "0.18.0", "turbomind"),
        ("mixtral-8x7b", "0.6.2", "turbomind"),
        ("mixtral-8x7b", "0.6.1", "pytorch"),
        ("qwen2-vl-2b", "0.6.3", "pytorch"),  # TurboMind from 0.9.2 on
        ("qwen2-vl-2b", "0.10.0", "turbomind"),
        ("internvl2-8b", "0.4.0", "turbomind"),
        ("llama-2-7b", "0.2.0", "turbomind"),  # older than LMDeploy's lists
        ("llava-1.5-7b", "0.3.0", "turbomind"),  # in its own format
    ],
)
def test_the_engine_that_knew_it_is_taken(model: str, version: str, engine: str) -> None:
    assert engine_for(preset_model(model), version=version).name == engine


@pytest.mark.parametrize(
    ("model", "version", "words"),
    [
        ("qwen3-8b", "0.5.3", "turbomind engine of LMDeploy 0.5.3 does not run Qwen3ForCausalLM"),
        ("qwen3-8b", "0.7.2", "which came with 0.7.3"),
        ("qwen2-vl-2b", "0.5.3", "does not run Qwen2VLForConditionalGeneration"),
        ("internvl3.5-8b", "0.7.2", "does not run Qwen3ForCausalLM"),  # its language model
    ],
)
def test_what_a_version_did_not_know_is_refused(model: str, version: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine_for(preset_model(model), version=version)


def test_the_other_engine_is_named_where_it_knew_the_model() -> None:
    with pytest.raises(UsageError) as told:
        engine_for(preset_model("mixtral-8x7b"), "turbomind", "0.6.0")
    assert told.value.hint == "--engine pytorch does"


def test_no_inner_model_is_newer_than_the_vision_model_that_has_it() -> None:
    """Else a vision model would be refused whose class builds its language model itself."""
    for name in ("gemma-3-4b", "glm-4.1v-9b", "qwen3-vl-8b", "intern-s1-mini", "internvl3-8b-hf"):
        model = preset_model(name)
        for engine in ("turbomind", "pytorch"):
            first = first_versions._first_versions(engine).get(model.architecture)
            assert first is None or not_yet(model, engine, first) is None, name


def test_each_release_is_one_and_each_architecture_has_one() -> None:
    data: dict[str, Any] = load_yaml(preset_path("engines", "first-versions"))
    for engine in ("turbomind", "pytorch"):
        names = [name for found in data[engine].values() for name in found]
        assert len(names) == len(set(names))
        assert all(is_legacy(release) for release in data[engine])


def test_a_damaged_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_versions, "load_yaml", lambda _: {"turbomind": 1})
    first_versions._first_versions.cache_clear()
    with pytest.raises(UsageError, match=r"first-versions\.yaml is damaged"):
        not_yet(preset_model("qwen3-8b"), "turbomind", "0.5.3")
