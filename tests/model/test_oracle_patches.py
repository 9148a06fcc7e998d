"""Qwen3-VL and GLM-4.1V: Transformers' resizing over thousands of sizes, and its parameters."""

from __future__ import annotations

import json
import random

import pytest

from tests.support.oracles import count, glm_of, qwen3_of, read, sizes
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule, VideoRule
from turbofit.model.checkpoint import Origin, Weights, read_checkpoint
from turbofit.model.families.engines import engine_problem

BOUNDS = [
    (65536, 16_777_216),
    (12_544, 9_633_792),
    (2048, 4096),
    (900_000, 1_000_000),
    (2, 60_000),
    (3136, 12_845_056),
]


@pytest.mark.parametrize(("smallest", "largest"), BOUNDS)
def test_windows_of_32_are_transformers(transformers, smallest, largest):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rule = PatchRule(patch_size=16, merge=2, min_pixels=smallest, max_pixels=largest)
    worst = 0
    for width, height in sizes(largest, 130):
        try:
            rows, columns = smart_resize(
                height, width, factor=32, min_pixels=smallest, max_pixels=largest
            )
        except ValueError:
            with pytest.raises(UsageError):
                rule.units(width, height)
            continue
        found = rule.units(width, height)
        assert (found, rule.unit_tokens(found)) == (rows * columns // 256, rows * columns // 1024)
        worst = max(worst, found)
    assert worst <= rule.worst_units()


@pytest.mark.parametrize(("smallest", "largest"), BOUNDS)
def test_glm_is_transformers(transformers, smallest, largest):
    from transformers.models.glm4v.image_processing_glm4v import smart_resize

    rule = PatchRule(
        patch_size=14, merge=2, min_pixels=smallest // 2, max_pixels=largest // 2, frames=2,
        enlarge=True, client_knobs=False,
    )  # fmt: skip
    worst = 0
    for width, height in sizes(largest, 130):
        try:
            rows, columns = smart_resize(
                2, height, width, factor=28, min_pixels=smallest, max_pixels=largest
            )
        except ValueError:
            with pytest.raises(UsageError):
                rule.units(width, height)
            continue
        found = rule.units(width, height)
        assert (found, rule.unit_tokens(found)) == (rows * columns // 196, rows * columns // 784)
        worst = max(worst, found)
    assert worst <= rule.worst_units()


@pytest.mark.parametrize("family", ["Qwen3VL", "Qwen3VLMoe"])
@pytest.mark.parametrize("seed", range(6))
def test_qwen3_vl_parameters(transformers, family, seed):
    config = qwen3_of(transformers, family, random.Random(f"{family}{seed}"))
    model = read(config)
    assert model.parameters == count(transformers, f"{family}ForConditionalGeneration", config)
    assert engine_problem(model, "pytorch") is engine_problem(model, "transformers") is None
    assert "encoder" in engine_problem(model, "turbomind")


@pytest.mark.parametrize("seed", range(6))
def test_glm_parameters(transformers, seed):
    config = glm_of(transformers, random.Random(seed))
    model = read(config)
    assert model.parameters == count(transformers, "Glm4vForConditionalGeneration", config)
    assert engine_problem(model, "pytorch") is engine_problem(model, "transformers") is None


@pytest.mark.parametrize("family", ["Qwen3VL", "Glm4v", "Qwen3VLMoe"])
def test_defaults_are_transformers(transformers, family):
    name = f"{family}ForConditionalGeneration"
    config = getattr(transformers, f"{family}Config")(
        **({"vision_config": {"out_hidden_size": 4096}} if family == "Qwen3VL" else {}),
        **({"vision_config": {"out_hidden_size": 2048}} if family == "Qwen3VLMoe" else {}),
    )
    wide = config.vision_config.out_hidden_size
    text = f'{{"architectures": ["{name}"], "vision_config": {{"out_hidden_size": {wide}}}}}'
    model = read(text)
    assert model.parameters == count(transformers, name, config)
    assert model.text.max_position_embeddings == config.text_config.max_position_embeddings


class Files:
    """A config and a preprocessor's."""

    def __init__(self, **files) -> None:
        self.files = files

    def read(self, name):
        content = self.files.get(name.removesuffix(".json"))
        return None if content is None else json.dumps(content).encode()

    def weights(self):
        return Weights(None)


def test_bounds_are_the_preprocessors():
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "vision_config": {"out_hidden_size": 4096},
    }
    size = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    origin = Origin(name="x", kind="folder", where="x")
    files = Files(config=config, preprocessor_config=size | {"patch_size": 16})
    rule = read_checkpoint(files, origin).image_rule
    assert rule == PatchRule(
        patch_size=16, merge=2, min_pixels=65536, max_pixels=16777216, client_knobs=False,
        video=VideoRule(merged_frames=2, min_pixels=65536, max_pixels=16777216),
    )  # fmt: skip
    own = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    for more in (
        {"video_preprocessor_config": own},
        {"processor_config": {"video_processor": own}, "video_preprocessor_config": size},
    ):
        files = Files(config=config, preprocessor_config=size, **more)
        video = read_checkpoint(files, origin).image_rule.video
        assert (video.min_pixels, video.max_pixels) == (4096, 25165824)
    video = read_checkpoint(Files(config=config), origin).image_rule.video
    assert (video.min_pixels, video.max_pixels) == (131072, 786432)
    assert rule.worst_units() == 65536
    config = {"architectures": ["Glm4vForConditionalGeneration"]}
    size = {"size": {"shortest_edge": 12544, "longest_edge": 9633792}}
    rule = read_checkpoint(Files(config=config, preprocessor_config=size), origin).image_rule
    assert (rule.min_pixels, rule.max_pixels, rule.frames) == (6272, 4816896, 2)
    assert rule.worst_units() == 24576
    for wrong in ({"patch_size": 16}, {"merge_size": 4}, {"size": {"longest_edge": 0}}):
        with pytest.raises(UsageError):
            read_checkpoint(Files(config=config, preprocessor_config=wrong), origin)
