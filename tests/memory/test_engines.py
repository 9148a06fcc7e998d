"""Which engine runs a model, and which versions of LMDeploy turbofit has an account of it for."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.memory.engines import engine_for
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(
    ("model", "engine", "new"),
    [
        ("qwen3.5-4b", "turbomind", "gated delta nets"),
        ("glm-4.7-flash", "turbomind", "multi-head latent attention"),
        ("deepseek-v2-lite", "pytorch", "multi-head latent attention"),
        ("gpt-oss-20b", "turbomind", "attention sinks"),
    ],
)
def test_what_older_versions_hold_otherwise_is_refused_there(
    model: str, engine: str, new: str
) -> None:
    dims = resolve_model(model)
    assert engine_for(dims, engine, "0.18.0").name == engine
    with pytest.raises(UsageError, match=rf"no account of {new} with LMDeploy 0\.12\.0"):
        engine_for(dims, engine, "0.12.0")
