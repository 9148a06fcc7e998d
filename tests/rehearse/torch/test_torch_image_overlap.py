from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

import turbofit.api
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule, TileRule
from turbofit.core.plan import Plan
from turbofit.rehearse.mixes import Image, Prompt
from turbofit.rehearse.torch.torch_image_overlap import (
    Pictures,
    ServerRoom,
    most_met,
    rehearsed_size,
    worst_cases,
    worst_mix,
)

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12845056)


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 11, 12])
def test_a_picture_gives_as_many_tiles_as_any(limit: int) -> None:
    size = rehearsed_size(TILES, limit)
    seen = TILES.units(*size, limit)
    assert seen == TILES.worst_units(limit)
    # The engine is not told of the limit: the picture keeps to it by itself.
    assert TILES.units(*size) == seen


@pytest.mark.parametrize("pixels", [12845056, 1003520, 602112, 100352, 3136])
def test_a_picture_gives_nearly_as_many_patches_as_any(pixels: int) -> None:
    size = rehearsed_size(PATCHES, pixels)
    seen, worst = PATCHES.units(*size), PATCHES.worst_units(pixels)
    assert 0.97 * worst <= seen <= worst


def test_a_picture_is_a_square_and_no_larger_than_the_checkpoints_own() -> None:
    assert rehearsed_size(PATCHES, None) == (3584, 3584)
    with pytest.raises(UsageError, match="checkpoint's own 12"):
        rehearsed_size(TILES, 24)


def tiles(*counts: int, text: int = 1) -> Prompt:
    """A prompt with images of so many tiles."""
    return Prompt(text, tuple(Image(count, 256 * count) for count in counts), 0)


def test_prompts_that_meet_in_a_forward() -> None:
    # Whole prompts join while their tokens last.
    assert most_met([tiles(13), tiles(13), tiles(5)], 8192) == 31
    assert most_met([tiles(13), tiles(13), tiles(6)], 8192) == 26
    # A longer prompt is cut between its images; what follows it does not join it.
    assert most_met([tiles(13, 13, 3)], 4096) == 16
    assert most_met([tiles(13, 13, 4)], 4096) == 13
    assert most_met([tiles(5, 5), tiles(3)], 2048) == 5
    # An image that is longer than a forward is never cut. All chunks are as long as the longest
    # image, so that smaller ones meet in another.
    for prompts in (
        [tiles(13, 6, 6)], [tiles(13, 6, 7)], [tiles(6, 7, 13)],
        [tiles(6, 6, 13), tiles(4), tiles(3)],
    ):  # fmt: skip
        assert most_met(prompts, 2048) == 13


def units(pictures: Pictures, room: ServerRoom) -> list[list[int]]:
    """Units of the images of each request of the mix, as their sizes make them."""
    return [
        [pictures.rule.units(*size) for size in pictures.sizes(prompt)]
        for prompt in worst_mix(pictures, room)
    ]


def test_unequal_tiles_fill_a_forward_twice() -> None:
    pictures = Pictures(TILES, rehearsed_size(TILES, None), 1)
    assert units(pictures, ServerRoom(8, 8192)) == [[13], [13], [5]] * 2
    assert units(pictures, ServerRoom(2, 8192)) == [[13], [13]]
    assert units(pictures, ServerRoom(8, 8192, gate=22)) == [[13], [9]]
    # No request has more units than it may.
    pictures = Pictures(TILES, rehearsed_size(TILES, None), 3, request_units=20)
    assert [image[0] for image in pictures.request().images] == [13, 7]
    assert all(sum(request) <= 20 for request in units(pictures, ServerRoom(8, 8192)))


def test_several_images_a_request_save_text_of_prompts() -> None:
    largest = rehearsed_size(PATCHES, 1344 * 1568)
    (one,), (other,), *_ = units(Pictures(PATCHES, largest, 1), ServerRoom(8, 4096))
    (first, *chunk), _ = units(Pictures(PATCHES, largest, 3), ServerRoom(8, 4096))
    # The first image ends a chunk; the next chunk has no text.
    assert first == one == 10752
    assert one + other < sum(chunk) <= 4096 * 4


def sent(plan: Plan) -> tuple[list[list[int]], set[int | None]]:
    """Units of the images of each request of a plan's mix, and their numbers."""
    rule = plan.model.image_rule
    assert rule is not None
    (case,) = (case for case in worst_cases(plan) if case.name == "vision_forward")
    found = [[rule.units(*size) for size in request.sizes] for request in case.requests]
    return found, {request.images for request in case.requests}


@pytest.mark.parametrize(
    ("model", "options", "share"),
    [
        ("internvl2-1b", {}, 0.96),
        ("internvl2-1b", {"images": 3}, 0.96),
        ("internvl2-1b", {"max_prefill_token_num": 2048}, 1.0),  # an image is a forward
        ("qwen2-vl-2b", {}, 1.0),
        ("qwen2-vl-2b", {"image_size": (1344, 1568)}, 0.98),
        ("qwen2-vl-2b", {"image_size": (1344, 1568), "max_prefill_token_num": 4096}, 0.97),
        ("qwen2-vl-2b", {"image_size": (1344, 1568), "images": 3}, 0.98),
    ],
)
def test_nearly_as_many_meet_as_the_account_pays_for(
    model: str, options: dict[str, Any], share: float
) -> None:
    options = {"max_prefill_token_num": 8192, **options}
    plan = turbofit.api.plan(model, on="1xrtx3060", engine="pytorch", **options)
    found, _ = sent(plan)
    assert len(found) <= plan.settings.max_batch_size
    assert all(sum(request) <= plan.limits.units_per_request for request in found)
    rule, paid = plan.model.image_rule, plan.limits.units_per_forward
    assert rule is not None
    prompts = [
        Prompt(33, tuple(Image(one, rule.unit_tokens(one)) for one in request), 0)
        for request in found
        if request
    ]
    met = most_met(prompts, plan.settings.max_prefill_token_num)
    assert share * paid <= met <= paid


@pytest.mark.parametrize("gate", [10752, 16000, 20000, 25000])
def test_unequal_images_fill_what_the_gateway_lets_through(gate: int) -> None:
    options = {"max_prefill_token_num": 8192, "image_size": (1344, 1568)}
    plan = turbofit.api.plan("qwen2-vl-2b", on="1xrtx3060", engine="pytorch", **options)
    less = replace(plan, limits=replace(plan.limits, units_per_forward=gate))
    found, _ = sent(less)
    assert 0.99 * gate <= sum(map(sum, found)) <= gate


def test_a_prefix_cache_is_sent_pictures_that_it_has_not_seen() -> None:
    options = {"max_prefill_token_num": 8192, "enable_prefix_caching": True}
    plan = turbofit.api.plan("internvl2-1b", on="1xrtx3060", engine="pytorch", **options)
    found, shades = sent(plan)
    assert len(shades) == len(found) == 6
    assert None not in shades  # which vision_request sent before
