"""LMDeploy's own preprocessing and loaders against what turbofit read from the same folder."""

from __future__ import annotations

import json
import random
from unittest.mock import MagicMock

import pytest
from msgspec.structs import replace

from tests.support.checkpoints import make_internvl2, make_qwen2_vl
from tests.support.oracles import picture, tokens_of
from turbofit.core.images import PatchRule
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.twin import checkpoint_for

pytestmark = pytest.mark.lmdeploy


def test_internvl_image_tokens(transformers, tmp_path):
    folder = make_internvl2(tmp_path / "InternVL2-1B", max_dynamic_patch=7)
    rule = resolve_model(str(folder)).image_rule
    rng = random.Random(4)
    cases = [((448, 448), {}), ((800, 600), {}), ((800, 600), {"max_dynamic_patch": 4})]
    cases += [
        (
            (rng.randrange(20, 900), rng.randrange(20, 900)),
            {"max_dynamic_patch": rng.choice([1, 3])},
        )
        for _ in range(8)
    ]
    expected = tokens_of(folder, [(picture(*size), knobs) for size, knobs in cases])
    assert [replace(rule, **knobs).tokens(*size) for size, knobs in cases] == expected


def test_qwen_image_tokens(transformers, tmp_path):
    folder = make_qwen2_vl(tmp_path / "Qwen2-VL-2B-Instruct", max_pixels=400_000)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_heads"] = 1  # heads of 64, as TurboMind needs
    (folder / "config.json").write_text(json.dumps(config))
    rule = resolve_model(str(folder)).image_rule
    rng = random.Random(4)
    sizes = [(rng.randrange(20, 1500), rng.randrange(20, 1500)) for _ in range(10)]
    expected = tokens_of(folder, [(picture(*size), {}) for size in sizes])
    assert [rule.unit_tokens(rule.units(*size)) for size in sizes] == expected


def test_internvl_chat_needs_its_config_class(transformers, tmp_path, monkeypatch):
    """Without remote code llm_config is a plain dict, and TurboMind's loader falls over it."""
    import lmdeploy.turbomind as engine
    from lmdeploy.archs import get_model_arch

    monkeypatch.setattr(engine, "_tm", MagicMock(), raising=False)
    folder = make_internvl2(tmp_path / "InternVL2-1B")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(folder)).needs_remote_code
    from lmdeploy.turbomind.models.internvl import InternVLModel

    read = get_model_arch(str(folder))[1]
    with pytest.raises(AttributeError, match="hidden_size"):
        InternVLModel(read, resolver=None)


@pytest.mark.parametrize("preset", ["mineru2.5-pro-1.2b", "intern-s1-mini"])
def test_images_of_presets_are_counted_as_lmdeploy_does(transformers, tmp_path, preset):
    model = preset_model(preset)
    rule, folder = model.image_rule, tmp_path / "twin"
    checkpoint_for(model, folder)
    if isinstance(rule, PatchRule):
        path = folder / "preprocessor_config.json"
        bounds = {"min_pixels": rule.min_pixels, "max_pixels": rule.max_pixels}
        path.write_text(json.dumps(json.loads(path.read_text()) | bounds))
    rng = random.Random(3)
    pages = [(rng.randrange(8, 2600), rng.randrange(8, 2600)) for _ in range(8)]
    found = tokens_of(folder, [(picture(*page), {}) for page in pages])
    assert found == [rule.tokens(*page) for page in pages]
