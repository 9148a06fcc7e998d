"""LLaVA: grids, towers and settings that no rule can express are refused."""

from __future__ import annotations

import pytest

from tests.support.tiny_checkpoints import read
from turbofit.core.errors import UsageError


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("LlavaNext", {"image_grid_pinpoints": [[100, 336]]}, "whole tiles of 336"),
        ("LlavaNext", {"image_grid_pinpoints": []}, "no list of pairs"),
        ("LlavaOnevision", {"vision_aspect_ratio": "square"}, "not anyres_max_ and a number"),
        ("Llava", {"vision_feature_layer": [-2, -5]}, "is not one layer"),
        ("Llava", {"multimodal_projector_bias": False}, "which LMDeploy does not read"),
        ("Llava", {"vision_config": {"model_type": "dino"}}, "that turbofit does not know"),
    ],
)
def test_configs_that_are_refused(family: str, config, said: str) -> None:
    text = {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UsageError, match=said):
        read(
            config={
                "architectures": [f"{family}ForConditionalGeneration"],
                "text_config": text,
                **config,
            }
        )
