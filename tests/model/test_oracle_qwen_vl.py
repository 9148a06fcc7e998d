"""Transformers' own resizing, over thousands of sizes."""

from __future__ import annotations

import random

import pytest

from tests.support.oracles import sizes
from tests.support.tiny_checkpoints import read
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule, VideoRule
from turbofit.model.presets import preset_model

BOUNDS = [
    (3136, 12_845_056), (3136, 1_003_520), (784, 784), (200_000, 100_000), (1, 50_000),
    (1_000_000, 1_000_001), (3136, 157_000), (256 * 784, 1280 * 784), (50_000_000, 60_000_000),
]  # fmt: skip
BOUNDS_OF_16 = [
    (65536, 16_777_216), (12_544, 9_633_792), (2048, 4096), (900_000, 1_000_000), (2, 60_000),
    (3136, 12_845_056),
]  # fmt: skip


@pytest.mark.parametrize(
    ("patch", "glm", "smallest", "largest"),
    [
        *((14, False, *bounds) for bounds in BOUNDS),
        *((16, False, *bounds) for bounds in BOUNDS_OF_16),
        *((14, True, *bounds) for bounds in BOUNDS_OF_16),
    ],
)
def test_patches_are_transformers(transformers, patch, glm, smallest, largest):
    from transformers.models.glm4v.image_processing_glm4v import smart_resize as resize_frames
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    bounds = {"min_pixels": smallest, "max_pixels": largest}
    rule = PatchRule(patch_size=patch, merge=2, **bounds)
    if glm:  # counts the frames of a video in its pixels, two for an image
        rule = PatchRule(
            patch_size=patch, merge=2, min_pixels=smallest // 2, max_pixels=largest // 2, frames=2,
            enlarge=True, client_knobs=False,
        )  # fmt: skip
    worst = 0
    for width, height in sizes(largest, 200):
        args = (2, height, width) if glm else (height, width)
        try:
            rows, columns = (resize_frames if glm else smart_resize)(
                *args, factor=2 * patch, **bounds
            )
        except ValueError:
            with pytest.raises(UsageError):
                rule.units(width, height)
            continue
        found = rule.units(width, height)
        assert found == rows * columns // patch**2, (width, height)
        assert rule.unit_tokens(found) == found // 4
        worst = max(worst, found)
    assert worst <= rule.worst_units()


def test_pages_of_mineru_are_transformers(transformers):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rule = preset_model("mineru2.5-pro-1.2b").image_rule
    pages = [size for size in sizes(7, 600) if max(size) <= 200 * min(size)]
    assert len(pages) > 2000
    for width, height in pages:
        rows, columns = smart_resize(
            height, width, factor=28, min_pixels=50_176, max_pixels=1_605_632
        )
        assert rule.tokens(width, height) == rows * columns // 784, (width, height)
    assert rule.units(1036, 1036) == 74 * 74


def test_pixels_become_that_many_patches(transformers):
    """The real processor on real pixels; both bounds are given, as Transformers 5.17 needs."""
    import torch
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor()
    rng = random.Random(2)
    for _ in range(25):
        width, height = rng.randrange(8, 500), rng.randrange(8, 500)
        smallest, largest = rng.choice([(784, 20_000), (3136, 100_000), (30_000, 90_000)])
        rule = PatchRule(patch_size=14, merge=2, min_pixels=smallest, max_pixels=largest)
        answer = processor(
            [torch.zeros(3, height, width, dtype=torch.uint8)],
            min_pixels=smallest, max_pixels=largest, return_tensors="pt",
        )  # fmt: skip
        found = rule.units(width, height)
        assert found == int(answer["image_grid_thw"].prod())
        assert rule.unit_tokens(found) == found // 4


def test_bounds_are_the_preprocessors():
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "vision_config": {"out_hidden_size": 4096},
    }
    size = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    rule = read(config=config, preprocessor_config=size | {"patch_size": 16}).image_rule
    assert rule == PatchRule(
        patch_size=16, merge=2, min_pixels=65536, max_pixels=16777216, client_knobs=False,
        video=VideoRule(merged_frames=2, min_pixels=65536, max_pixels=16777216),
    )  # fmt: skip
    own = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    for more in (
        {"video_preprocessor_config": own},
        {"processor_config": {"video_processor": own}, "video_preprocessor_config": size},
    ):
        video = read(config=config, preprocessor_config=size, **more).image_rule.video
        assert (video.min_pixels, video.max_pixels) == (4096, 25165824)
    video = read(config=config).image_rule.video
    assert (video.min_pixels, video.max_pixels) == (131072, 786432)
    assert rule.worst_units() == 65536
    config = {"architectures": ["Glm4vForConditionalGeneration"]}
    size = {"size": {"shortest_edge": 12544, "longest_edge": 9633792}}
    rule = read(config=config, preprocessor_config=size).image_rule
    assert (rule.min_pixels, rule.max_pixels, rule.frames) == (6272, 4816896, 2)
    assert rule.worst_units() == 24576
    for wrong in ({"patch_size": 16}, {"merge_size": 4}, {"size": {"longest_edge": 0}}):
        with pytest.raises(UsageError):
            read(config=config, preprocessor_config=wrong)
