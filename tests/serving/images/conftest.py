"""LMDeploy's encoders of tiny checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from tests.support.front_ends import CHECKPOINTS


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    """Makes LMDeploy's encoder for a family's tiny checkpoint; Pillow is as it was afterwards."""
    monkeypatch.setattr(Image.Image, "resize", Image.Image.resize)
    monkeypatch.setattr("lmdeploy.vl.engine.is_bf16_supported", lambda *_: True)

    def make(family: str, dtype: str = "bfloat16") -> Any:
        from lmdeploy import PytorchEngineConfig
        from lmdeploy.serve.processors import multimodal
        from lmdeploy.vl.engine import ImageEncoder
        from lmdeploy.vl.media.image import ImageMediaIO

        monkeypatch.setattr(multimodal, "ImageMediaIO", ImageMediaIO)
        folder = tmp_path / family
        if not folder.exists():
            CHECKPOINTS[family](folder)
        return ImageEncoder(str(folder), "pytorch", backend_config=PytorchEngineConfig(dtype=dtype))

    return make
