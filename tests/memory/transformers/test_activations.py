"""What towers hold, beside what torch reserved for them in rehearsals of the real code."""

from __future__ import annotations

from turbofit.memory.transformers.activations import vision_bytes
from turbofit.memory.transformers.components import layout_of
from turbofit.model.presets import preset_model

MIB = 1 << 20
#: Fragments, as the account of a copy adds them.
ROUNDED = 1.1


def test_a_tower_with_pixel_masks_is_never_under() -> None:
    """SmolVLM2-256M, 17 tiles: 488 MiB were reserved beyond the weights, with Transformers 5.17."""
    model = preset_model("smolvlm2-256m")
    forecast = ROUNDED * vision_bytes(model, layout_of(model), 17, 2)
    assert 488 * MIB <= forecast <= 1.1 * 488 * MIB
