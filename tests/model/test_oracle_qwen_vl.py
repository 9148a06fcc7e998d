"""Transformers' own resizing, over thousands of sizes."""

from __future__ import annotations

import random

import pytest

from tests.support.oracles import sizes
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule
from turbofit.model.presets import preset_model

BOUNDS = [
    (3136, 12_845_056), (3136, 1_003_520), (784, 784), (200_000, 100_000), (1, 50_000),
    (1_000_000, 1_000_001), (3136, 157_000), (256 * 784, 1280 * 784), (50_000_000, 60_000_000),
]  # fmt: skip


@pytest.mark.parametrize(("smallest", "largest"), BOUNDS)
def test_patches_are_transformers(transformers, smallest, largest):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rule = PatchRule(patch_size=14, merge=2, min_pixels=smallest, max_pixels=largest)
    for width, height in sizes(largest, 250):
        try:
            rows, columns = smart_resize(
                height, width, factor=28, min_pixels=smallest, max_pixels=largest
            )
        except ValueError:
            with pytest.raises(UsageError):
                rule.units(width, height)
            continue
        assert rule.units(width, height) == rows * columns // 196, (width, height)


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
