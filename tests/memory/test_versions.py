"""LMDeploy's releases: whose account answers for one, and which models it lists."""

from __future__ import annotations

from typing import Any

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml, preset_path
from turbofit.memory import versions
from turbofit.memory.engines import engine_for
from turbofit.memory.versions import account_version, doubt, is_legacy, parse, written
from turbofit.model.families.engines import TURBOMIND_VISION
from turbofit.model.families.registry import VISION_READERS
from turbofit.model.families.text import TEXT_ARCHITECTURES, TURBOMIND_TEXT
from turbofit.model.presets import preset_model


def test_each_version_has_an_account_or_the_nearest_older_one_s() -> None:
    assert [parse(text) for text in ("0.6", "v0.5.2.post1", "0.19.0rc1", "new")] == [
        (0, 6, 0), (0, 5, 2), (0, 19, 0), None,
    ]  # fmt: skip
    assert is_legacy("0.17.9")
    assert not is_legacy("0.18.0")
    assert [account_version("turbomind", v) for v in ("0.18.3", "0.19", "1.2", "new", "0.17")] == [
        "0.18", "0.18", "0.18", None, None,
    ]  # fmt: skip
    assert doubt("turbomind", None) is doubt("pytorch", "0.18.1") is None
    assert "0.19 is newer than 0.18" in str(doubt("pytorch", "0.19"))


@pytest.mark.parametrize(
    ("model", "version", "engine"),
    [
        ("qwen3-8b", "0.7", "turbomind"),  # some 0.7.x does
        ("qwen3-8b", "v0.8.0.post1", "turbomind"),
        ("mixtral-8x7b", "0.6.2", "turbomind"),
        ("mixtral-8x7b", "0.6.1", "pytorch"),
        ("qwen2-vl-2b", "0.6.3", "pytorch"),  # TurboMind from 0.9.2 on
        ("qwen2-vl-2b", "0.10.0", "turbomind"),
        ("qwen2-vl-2b", "0.14.0", "pytorch"),  # TurboMind lost it, and has it again from 0.16 on
        ("qwen2.5-vl-7b", "0.16", "turbomind"),
        ("qwen3-vl-8b", "0.16.0", "pytorch"),  # TurboMind never had its tower
        ("llama-2-7b", "0.2.0", "turbomind"),  # older than LMDeploy's lists
        ("llava-1.5-7b", "0.3.0", "turbomind"),  # in its own format
        ("internvl2-1b", "0.6.2", "pytorch"),  # heads of 64: TurboMind from 0.6.3 on
        ("internvl2-1b", "0.6.3", "turbomind"),
        ("qwen2.5-0.5b", "0.5.3", "pytorch"),
        ("phi-3.5-vision", "0.5.1", "pytorch"),  # in no list, but its class is in the engine's map
    ],
)
def test_the_engine_that_knew_it_is_taken(model: str, version: str, engine: str) -> None:
    assert engine_for(preset_model(model), version=version).name == engine


@pytest.mark.parametrize(
    ("model", "engine", "version", "words"),
    [
        ("qwen3-8b", "turbomind", "0.5.3", "0.5.3 does not run Qwen3ForCausalLM"),
        ("qwen3-8b", "turbomind", "0.7.2", "which 0.7.3 runs"),
        ("mixtral-8x7b", "turbomind", "0.6.0", "does not run MixtralForCausalLM"),
        ("internvl3.5-8b", "turbomind", "0.7.2", "does not run Qwen3ForCausalLM"),  # inside
        (
            "smolvlm-256m",
            "auto",
            "0.16.0",
            "0.16.0 does not run Idefics3ForConditionalGeneration\n",
        ),
        ("llama-3.2-11b-vision", "pytorch", "0.12.0", "does not run Mllama"),
        ("qwen2-vl-7b", "turbomind", "0.9.1", "which 0.9.2 runs"),
        ("qwen2.5-0.5b", "turbomind", "0.6.2", "heads of 64 channels, which came with 0.6.3"),
        ("qwen2-vl-7b", "turbomind", "0.14", "which 0.16.0 runs"),
    ],
)
def test_what_a_version_did_not_know_is_refused(model, engine, version, words):
    with pytest.raises(UsageError, match=words) as told:
        engine_for(preset_model(model), engine, version)
    if model == "mixtral-8x7b":
        assert told.value.hint == "--engine pytorch runs the model"


def test_where_no_engine_of_a_release_runs_a_model_the_first_that_does_is_named() -> None:
    with pytest.raises(UsageError, match=r"no engine of LMDeploy 0\.10\.1 runs Qwen3VL") as error:
        engine_for(preset_model("qwen3-vl-4b"), "auto", "0.10.1")
    assert "which 0.11.0 runs" in error.value.message
    assert error.value.hint == "--lmdeploy 0.11.0 or newer"


def test_each_release_is_an_older_one_in_order_and_lists_what_turbofit_reads() -> None:
    data: dict[str, Any] = load_yaml(preset_path("engines", "architectures"))
    names = TEXT_ARCHITECTURES | set(VISION_READERS)
    for engine in ("turbomind", "pytorch"):
        releases = list(data[engine])
        assert releases == sorted(releases, key=written)
        assert set(versions.listings(engine)) <= names
    # What the reference runs by its own tables is listed at the end, and nothing has left.
    listed = versions.listings("turbomind").items()
    last = {name for name, spans in listed if spans[-1].left is None}
    assert last == (TURBOMIND_TEXT | TURBOMIND_VISION) & names
