"""The worst cases that a rehearsal sends."""

from __future__ import annotations

from typing import Any

import pytest

import turbofit.api
from tests.support.plans import changed
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule, TileRule
from turbofit.core.plan import Plan
from turbofit.rehearsal.cases import rehearsed_size, torch_cases, turbomind_cases
from turbofit.rehearsal.spec import RehearsalRequest

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
    seen, worst = PATCHES.units(*rehearsed_size(PATCHES, pixels)), PATCHES.worst_units(pixels)
    assert 0.97 * worst <= seen <= worst


def test_a_picture_is_a_square_and_no_larger_than_the_checkpoints_own() -> None:
    assert rehearsed_size(PATCHES, None) == (3584, 3584)
    with pytest.raises(UsageError, match="checkpoint's own 12"):
        rehearsed_size(TILES, 24)


def requests(plan: Plan, name: str) -> tuple[RehearsalRequest, ...]:
    of_engine = turbomind_cases if plan.backend.name == "turbomind" else torch_cases
    return next(
        (case.requests for case in of_engine(plan, plan.engines[0]) if case.name == name), ()
    )


def test_one_image_has_all_units_of_a_forward() -> None:
    plan = turbofit.api.plan("internvl2-8b", on="1xrtx3090", images=2, queue_images=False)
    assert requests(plan, "vision_request")[0].units == (13, 13)
    (request,) = requests(plan, "vision_forward")
    assert request.units == (plan.engines[0].units_per_forward,)


def test_a_cache_that_holds_no_image_is_asked_for_one_all_the_same() -> None:
    told = turbofit.api.predict("internvl2-8b", on="1xrtx3090", cache_max_entry_count=0.004)
    assert requests(told, "vision_request")[0].units == (told.promise.limits.units_per_image,)
    assert not requests(told, "vision_forward")


@pytest.mark.parametrize("gate", [10752, 16000, 20000, 25000])
def test_pictures_fill_what_the_gateway_lets_through(gate: int) -> None:
    options: dict[str, Any] = {"max_prefill_token_num": 8192, "image_size": (1344, 1568)}
    plan = turbofit.api.plan("qwen2-vl-2b", on="1xrtx3060", engine="pytorch", **options)
    (request,) = requests(changed(plan, units_per_forward=gate), "vision_forward")
    assert 0.99 * gate <= sum(PATCHES.units(*size) for size in request.sizes) <= gate
    # Without a gateway the pixels of a second request come while the first is read.
    assert len(requests(plan, "vision_forward")) == 2


def test_a_prefix_cache_is_sent_pictures_that_it_has_not_seen() -> None:
    options: dict[str, Any] = {"max_prefill_token_num": 8192, "enable_prefix_caching": True}
    plan = turbofit.api.plan("internvl2-1b", on="1xrtx3060", engine="pytorch", **options)
    assert [request.images for request in requests(plan, "vision_forward")] == [1, 2]
    assert requests(plan, "vision_request")[0].images is None
