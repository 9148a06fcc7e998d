"""Which engine runs a model, and which versions of LMDeploy turbofit has an account of it for."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.memory.engines import check_options, engine_for, engine_named
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(
    ("model", "engine", "new"),
    [
        ("qwen3.5-4b", "turbomind", "gated delta nets"),
        ("glm-4.7-flash", "turbomind", "multi-head latent attention"),
        ("deepseek-v2-lite", "pytorch", "multi-head latent attention"),
        ("gpt-oss-20b", "turbomind", "attention sinks"),
        ("qwen3-omni-30b-a3b", "pytorch", "an audio tower"),
    ],
)
def test_what_older_versions_hold_otherwise_is_refused_there(
    model: str, engine: str, new: str
) -> None:
    dims = resolve_model(model)
    assert engine_for(dims, engine, "0.18.0").name == engine
    with pytest.raises(UsageError, match=rf"no account of {new} with LMDeploy 0\.12\.0"):
        engine_for(dims, engine, "0.12.0")


@pytest.mark.parametrize(
    ("engine", "version", "words"),
    [
        ("turbomind", None, "--speculative-algorithm is no option of the turbomind engine"),
        ("transformers", None, "--speculative-algorithm is LMDeploy's"),
        ("pytorch", "0.9.0", "no account of speculative decoding with LMDeploy"),
    ],
)
def test_only_the_pytorch_engine_drafts(engine: str, version: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words) as told:
        check_options(engine_named(engine, version), {"speculative": None})
    assert told.value.hint
    check_options(engine_named("pytorch"), {"speculative": None})


@pytest.mark.parametrize(
    ("model", "method", "group", "said"),
    [
        ("qwen3-vl-8b", "compressed-tensors", 32, "reads compressed-tensors for experts only"),
        ("qwen3-vl-8b", "gptq", 128, "PyTorch engine does not read gptq weights"),
    ],
)
def test_lmdeploy_s_reasons_come_before_transformers(
    model: str, method: str, group: int, said: str
) -> None:
    packed = Quantization(method=method, bits=4, group_size=group)
    dims = replace(resolve_model(model), quantization=packed)
    with pytest.raises(UsageError) as told:
        engine_for(dims)
    text = str(told.value)
    assert 0 < text.index(said) < text.index("Transformers runs")
    assert text.startswith("TurboMind 0.18 has no encoder")
    assert "not quantised" in told.value.hint
