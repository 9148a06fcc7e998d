"""GLM: keys of its own that contradict each other, or that LMDeploy does not run."""

from __future__ import annotations

import pytest

from tests.support.tiny_checkpoints import read
from turbofit.core.errors import UsageError


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("ChatGLMModel", {"kv_channels": 64}, "kv_channels is not 4096 / 32"),
        ("ChatGLMModel", {"rmsnorm": False}, "rmsnorm or post_layer_norm is false"),
        ("ChatGLMModel", {"multi_query_group_num": 3}, "3 does not divide 32 heads"),
        (
            "Glm4vForConditionalGeneration",
            {"vision_config": {"out_hidden_size": 5}},
            "out_hidden_size is not the language model's 4096",
        ),
    ],
)
def test_configs_that_are_refused(architecture: str, config, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(config={"architectures": [architecture], **config})
