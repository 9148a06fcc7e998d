"""LMDeploy's and Transformers' own tiling, over thousands of sizes."""

from __future__ import annotations

import random

import pytest

from turbofit.core.images import TileRule


class Picture:
    """All that the preprocessing asks of an image."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def resize(self, size: tuple[int, int]) -> Picture:
        return Picture(size)

    def crop(self, box: tuple[int, int, int, int]) -> Picture:
        return self


def sizes(seed: int, count: int) -> list[tuple[int, int]]:
    """Random sizes, extreme ratios, exact ratios and exact ties."""
    rng = random.Random(seed)
    found = [(448, 448), (1, 1), (1, 200), (200, 1), (3000, 15), (15, 3000), (8192, 8192)]
    for _ in range(count):
        found.append((rng.randrange(1, 5000), rng.randrange(1, 5000)))
        found.append((rng.randrange(1, 5000), rng.randrange(1, 60)))
        columns, rows, scale = rng.randrange(1, 13), rng.randrange(1, 13), rng.randrange(1, 700)
        found.append((columns * scale, rows * scale))
        # Half way between two candidate ratios, where the area decides.
        other, least = rng.randrange(1, 13), rng.randrange(1, 13)
        found.append((columns * other + least * rows, 2 * rows * other))
        scale = rng.randrange(1, 300)
        found.append(((columns * other + least * rows) * scale, 2 * rows * other * scale))
    return [(width, height) for width, height in found if width and height]


@pytest.mark.lmdeploy
@pytest.mark.parametrize(
    ("smallest", "limit", "count"),
    [(1, 12, 500), (1, 6, 150), (1, 24, 60), (1, 4, 150), (1, 1, 20), (2, 7, 100), (6, 6, 60),
     (1, 40, 12), (9, 4, 20), (1, 0, 10)],
)  # fmt: skip
@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_are_lmdeploys(transformers, smallest, limit, count, thumbnail):
    from lmdeploy.vl.model.internvl import dynamic_preprocess

    rule = TileRule(
        tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, min_dynamic_patch=smallest,
        thumbnail=thumbnail,
    )  # fmt: skip
    for width, height in sizes(limit * 31 + smallest, count):
        pieces = dynamic_preprocess(
            Picture((width, height)), min_num=smallest, max_num=limit, image_size=448,
            use_thumbnail=thumbnail,
        )  # fmt: skip
        assert rule.units(width, height, limit) == len(pieces), (width, height)


@pytest.mark.parametrize(("smallest", "limit"), [(1, 12), (1, 6), (2, 9), (1, 24), (1, 1)])
def test_tiles_are_transformers(transformers, smallest, limit):
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    processor = GotOcr2ImageProcessor(size={"height": 448, "width": 448})
    rule = TileRule(
        tile_size=448, tokens_per_tile=256, max_dynamic_patch=limit, min_dynamic_patch=smallest,
        client_knobs=False,
    )  # fmt: skip
    knobs = {"crop_to_patches": True, "min_patches": smallest, "max_patches": limit}
    for width, height in sizes(limit + 100, 500):
        expected = processor.get_number_of_image_patches(height, width, knobs)
        assert rule.units(width, height) == expected, (width, height)


def test_pixels_become_that_many_tiles(transformers):
    """The real processor on real pixels, not only its counting function."""
    import torch
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    processor = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=12)
    rule = TileRule(tile_size=28, tokens_per_tile=1, max_dynamic_patch=12, client_knobs=False)
    rng = random.Random(11)
    for _ in range(40):
        width, height = rng.randrange(2, 400), rng.randrange(2, 400)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        answer = processor([image], crop_to_patches=True, return_tensors="pt")
        assert len(answer["pixel_values"]) == rule.units(width, height)
