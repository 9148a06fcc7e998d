"""Qwen-VL: the pixels that its processor allows."""

from __future__ import annotations

import pytest

from tests.support.tiny_checkpoints import QWEN, read


@pytest.mark.parametrize(
    ("files", "bounds"),
    [
        ({"preprocessor_config": {"min_pixels": 3136, "max_pixels": 12845056}}, (3136, 12845056)),
        ({"preprocessor_config": {"size": {"shortest_edge": 9, "longest_edge": 784}}}, (9, 784)),
        ({"preprocessor_config": {"max_pixels": 9, "size": {"longest_edge": 7840}}}, (3136, 9)),
        ({"preprocessor_config": {"max_pixels": 9},
          "processor_config": {"image_processor": {"max_pixels": 11}}}, (3136, 11)),
        ({"preprocessor_config": {"max_pixels": 9}, "processor_config": {"a": 1}}, (3136, 9)),
        ({}, (3136, 1003520)),
    ],
)  # fmt: skip
def test_qwen_pixel_bounds(files, bounds):
    model = read(config=QWEN, **files)
    assert (model.image_rule.min_pixels, model.image_rule.max_pixels) == bounds
    assert bool(model.warnings) is (not files)
