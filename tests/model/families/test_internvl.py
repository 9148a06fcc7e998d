"""InternVL: its tower, its tiles, and configs that its code would not run."""

from __future__ import annotations

import json

import pytest

from tests.support.checkpoints import make_internvl2
from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


def internvl(tmp_path, **changes):
    folder = make_internvl2(tmp_path / "InternVL2-1B")
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *parts, key = path.split("__")
        inner = config
        for part in parts:
            inner = inner[part]
        inner[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"ps_version": "v1"},
        {"force_image_size": 224},
        {"downsample_ratio": 0.3},
        {"llm_config__architectures": []},
        {"llm_config__architectures": ["DeepseekV4ForCausalLM"]},
        {"llm_config": None},
        {"vision_config": None},
        {"vision_config__norm_type": "group_norm"},
        {"vision_config__num_attention_heads": 5},
        {"vision_config__image_size": 450},
        {"vision_config__num_hidden_layers": 3},
        {"vision_config__hidden_size": 128},
        {"max_dynamic_patch": 10**9},
        {"max_dynamic_patch": "12"},
        {"use_thumbnail": 1},
    ],
)
def test_internvl_that_would_not_run(tmp_path, changes):
    with pytest.raises(UsageError):
        resolve_model(internvl(tmp_path, **changes))


def test_images_are_tiled_where_there_is_no_preprocessor(tmp_path):
    """LMDeploy looks at dynamic_image_size only where a preprocessor config is there too."""
    folder = internvl(tmp_path, dynamic_image_size=False)
    assert resolve_model(folder).image_rule.dynamic
    (tmp_path / "InternVL2-1B" / "preprocessor_config.json").write_text("{}")
    assert not resolve_model(folder).image_rule.dynamic
