"""Stand-ins for the model room: sparse checkpoints, and the libraries that serve as oracles."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

#: Operators live as long as the library that defines them.
BITS = {"BF16": 16, "F16": 16, "F32": 32, "I32": 32, "I64": 64, "F8_E4M3": 8, "U8": 8}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """A safetensors file with a real header over a hole; returns the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    return end


@pytest.fixture(autouse=True)
def _own_hub(tmp_path, monkeypatch):
    """No test reads the machine's hub cache or reaches a network."""
    for key in (
        "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE",
        "LMDEPLOY_USE_MODELSCOPE", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN",
        "MODELSCOPE_API_TOKEN",
    ):  # fmt: skip
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")
