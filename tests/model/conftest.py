"""Stand-ins for the model room: sparse checkpoints, and the libraries that serve as oracles."""

from __future__ import annotations

import pytest

from tests.support.oracles import engine_parameters

__all__ = ["engine_parameters"]


@pytest.fixture(autouse=True)
def _own_hub(tmp_path, monkeypatch):
    """No test reads the machine's hub cache or reaches a network."""
    for key in (
        "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE",
        "LMDEPLOY_USE_MODELSCOPE", "MODELSCOPE_ENDPOINT", "MODELSCOPE_API_TOKEN",
    ):  # fmt: skip
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")
