"""Llama 4: a tower whose sizes contradict each other is refused."""

from __future__ import annotations

import pytest

from tests.support.tiny_checkpoints import read
from turbofit.core.errors import UsageError


def llama4(**change: object) -> dict[str, object]:
    vision = {"hidden_size": 1408, "vision_output_dim": 4096, "image_size": 336}
    return {"vision_config": vision | change}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (llama4(pixel_shuffle_ratio=0.3), "does not make"),
        (llama4(vision_output_dim=5), "is not projector_output_dim's 4096"),
        (llama4(image_size=340), "not whole windows of 28 pixels"),
        (llama4(num_attention_heads=7), "does not divide"),
    ],
)
def test_a_tower_that_contradicts_itself_is_refused(config, said):
    with pytest.raises(UsageError, match=said):
        read(config={"architectures": ["Llama4ForConditionalGeneration"], **config})
