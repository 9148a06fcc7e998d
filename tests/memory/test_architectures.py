"""Which releases of LMDeploy list a model."""

from __future__ import annotations

from typing import Any

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml, preset_path
from turbofit.memory import architectures
from turbofit.memory.architectures import not_listed
from turbofit.memory.engines import engine_for
from turbofit.memory.versions import written
from turbofit.model.families.engines import TURBOMIND_VISION
from turbofit.model.families.registry import VISION_READERS
from turbofit.model.families.text import TEXT_ARCHITECTURES, TURBOMIND_TEXT
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
        ("qwen2-vl-2b", "0.14.0", "pytorch"),  # TurboMind lost it, and has it again from 0.16 on
        ("qwen2.5-vl-7b", "0.15", "pytorch"),
        ("qwen2.5-vl-7b", "0.16", "turbomind"),
        ("llava-1.5-7b", "0.13.0", "turbomind"),
        ("llava-1.5-7b", "0.14.0", "pytorch"),
        ("qwen3-vl-8b", "0.16.0", "pytorch"),  # TurboMind never had its tower
        ("intern-s1-pro", "0.17.0", "pytorch"),
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
        ("smolvlm-256m", "0.16.0", "0.16.0 does not run Idefics3ForConditionalGeneration$"),
        ("llama-3.2-11b-vision", "0.12.0", "does not run MllamaForConditionalGeneration"),
    ],
)
def test_what_a_version_did_not_know_is_refused(model: str, version: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine_for(preset_model(model), version=version)


def test_the_other_engine_is_named_where_it_knew_the_model() -> None:
    with pytest.raises(UsageError) as told:
        engine_for(preset_model("mixtral-8x7b"), "turbomind", "0.6.0")
    assert told.value.hint == "--engine pytorch does"


@pytest.mark.parametrize(
    ("model", "engine", "version", "words"),
    [
        ("qwen2-vl-7b", "turbomind", "0.9.1", "which came with 0.9.2"),
        ("qwen2-vl-7b", "turbomind", "0.14", "which left with 0.14.0 and came back with 0.16.0"),
        ("qwen2-vl-7b", "turbomind", "0.15.0", "which left with 0.14.0 and came back with 0.16.0"),
        ("llama-3.2-11b-vision", "pytorch", "0.12", "which left with 0.12.0"),
        ("qwen3-vl-8b", "turbomind", "0.17.0", "does not run Qwen3VLForConditionalGeneration"),
        ("kimi-k2.5", "pytorch", "0.16", "which came with 0.17.0"),
    ],
)
def test_when_it_came_and_left_is_said(model: str, engine: str, version: str, words: str) -> None:
    assert (not_listed(preset_model(model), engine, version) or "").endswith(words)


def test_no_inner_model_is_newer_than_the_vision_model_that_has_it() -> None:
    """Else a vision model would be refused whose class builds its language model itself."""
    for name in ("gemma-3-4b", "glm-4.1v-9b", "qwen3-vl-8b", "intern-s1-mini", "internvl3-8b-hf"):
        model = preset_model(name)
        for engine in ("turbomind", "pytorch"):
            for span in architectures._spans(engine).get(model.architecture, ()):
                assert not_listed(model, engine, span.came) is None, name


def test_each_release_is_an_older_one_in_order_and_lists_what_turbofit_reads() -> None:
    data: dict[str, Any] = load_yaml(preset_path("engines", "architectures"))
    for engine in ("turbomind", "pytorch"):
        releases = list(data[engine])
        assert releases == sorted(releases, key=written)
        assert set(architectures._spans(engine)) <= TEXT_ARCHITECTURES | set(VISION_READERS)


def test_the_last_list_is_that_of_the_reference() -> None:
    """What the reference runs by its own tables is listed at the end, and nothing has left."""
    names = TEXT_ARCHITECTURES | set(VISION_READERS)
    listed = {
        name for name, spans in architectures._spans("turbomind").items() if spans[-1].left is None
    }
    assert listed == (TURBOMIND_TEXT | TURBOMIND_VISION) & names


def test_a_damaged_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "load_yaml", lambda _: {"turbomind": 1})
    architectures._spans.cache_clear()
    with pytest.raises(UsageError, match=r"architectures\.yaml is damaged"):
        not_listed(preset_model("qwen3-8b"), "turbomind", "0.5.3")
