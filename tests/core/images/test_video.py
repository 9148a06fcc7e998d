"""Videos against Transformers' own resizing, over thousands of sizes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule, VideoRule
from turbofit.core.images.video import Videos

OWN = VideoRule(merged_frames=2, min_pixels=4096, max_pixels=25_165_824)
RULE = PatchRule(patch_size=16, merge=2, min_pixels=65_536, max_pixels=16_777_216, video=OWN)
VIDEOS = Videos(OWN, 16, 2)
BOUNDS = [(4096, 25_165_824), (131_072, 786_432), (2000, 60_000), (4096, 5000), (900_000, 10**6)]


def clips(seed: int, count: int) -> list[tuple[int, int, int]]:
    """Frames, width and height; small and large ones alike."""
    rng = random.Random(seed)
    frames = [1, 2, 3, 4, 5, 7, 9, 16, 31, 32, 33, 100, 767, 768]
    sides = [1, 2, 15, 16, 31, 32, 33, 47, 48, 49, 224, 1080, 1920, 4096]
    return [
        (
            rng.choice(frames),
            *(rng.choice((rng.choice(sides), int(2 ** rng.uniform(0, 12.5)))) for _ in "wh"),
        )
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("smallest", "largest"), BOUNDS)
def test_patches_are_transformers(transformers: Any, smallest: int, largest: int) -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    taken = 0
    for frames, width, height in clips(smallest, 900):
        bounds = {"max_pixels": largest, "min_pixels": smallest}
        try:
            high, wide = smart_resize(frames, height, width, 2, 32, smallest, largest)
        except ValueError:
            with pytest.raises(UsageError):
                VIDEOS.units(frames, width, height, **bounds)
            continue
        taken += 1
        units = VIDEOS.units(frames, width, height, **bounds)
        assert units == VIDEOS.grids(frames) * (high // 16) * (wide // 16)
    assert taken > 500


@pytest.mark.parametrize("units", [64, 1024, 5000, 16_384, 65_536])
def test_what_fits_holds_however_many_frames_are_lost(units: int) -> None:
    fitted = 0
    for frames, width, height in clips(units, 60):
        try:
            most = VIDEOS.fitting_pixels(frames, width, height, units)
        except UsageError:
            continue
        if most is None:
            # Not even one window of each grid: a strip keeps its longer side.
            assert VIDEOS.grids(frames) * 4 * max(1, max(width, height) // 32) > units / 4
            continue
        fitted += 1
        assert most <= OWN.max_pixels
        least = VIDEOS.least_pixels(frames, most)
        assert least < most
        assert least * 1.05 * frames <= most
        for left in {2, 3, 5, 9, frames - 1, frames} & set(range(2, frames + 1)):
            bounds = {"max_pixels": most, "min_pixels": least}
            assert VIDEOS.units(left, width, height, **bounds) <= units
    assert fitted > 20


def test_a_bound_asked_for_is_kept_and_none_above_the_models_own_is_given() -> None:
    assert VIDEOS.fitting_pixels(32, 1920, 1080, 65_536) == 25_165_824
    assert VIDEOS.fitting_pixels(32, 1920, 1080, 65_536, most=10**12) == 25_165_824
    assert VIDEOS.fitting_pixels(32, 1920, 1080, 65_536, most=1_024_000) == 1_024_000
    # One image's units for the whole video: half as many pixels an image, since frames are merged.
    assert VIDEOS.fitting_pixels(32, 1024, 1024, 4096) == pytest.approx(2 * 1024**2, rel=0.3)


def test_single_frames_and_strips_are_refused() -> None:
    assert RULE.videos == VIDEOS
    assert replace(RULE, video=None).videos is None
    with pytest.raises(UsageError, match=r"(?m)a video of 1 frame$"):
        VIDEOS.grids(1)
    with pytest.raises(UsageError, match="longer than 200:1"):
        VIDEOS.units(2, 32 * 201, 32)
