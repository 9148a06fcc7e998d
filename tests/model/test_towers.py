"""Towers have as many parameters as their published checkpoints."""

from __future__ import annotations

import pytest

from turbofit.model.presets import preset_model
from turbofit.model.tensors import elements
from turbofit.model.towers import vision_tensors


@pytest.mark.parametrize(
    ("preset", "tower"),
    [("llava-1.5-7b", 303_507_456), ("gemma-3-4b", 416_866_032)],  # CLIP-L/14-336; SigLIP-So400m
)
def test_the_tower_before_the_projector(preset: str, tower: int) -> None:
    model = preset_model(preset)
    tensors = vision_tensors(model.vision, model.text.hidden)
    assert elements(one for one in tensors if one.part != "projector") == tower
    assert len({one.role for one in tensors}) == len(tensors)
