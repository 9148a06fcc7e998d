"""Of which models a stand-in checkpoint is made."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.model.presets import preset_model
from turbofit.rehearse.checkpoint.twin import twin_of


def test_int4_of_every_layer_has_no_twin() -> None:
    """Only experts are packed in one, so that the engine died of a model that nobody has."""
    packed = Quantization(method="compressed-tensors", bits=4, group_size=32)
    with pytest.raises(UsageError, match="no stand-in checkpoint is made for compressed-tensors"):
        twin_of(replace(preset_model("llama-3.1-8b"), quantization=packed))
    assert twin_of(preset_model("kimi-k2.5")).packing == "compressed-tensors"
