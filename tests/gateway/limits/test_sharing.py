"""Several images of a request within its units: pure, over every rule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.gateway.judge import units_reaching
from tests.gateway.test_new_rules import CANVAS, CROSS, FRAMES, GRIDS, PAGES, SQUARE
from tests.support.gateway import PATCHES, TILES, limits_for
from tests.sweep import part
from turbofit.core.images import AnyresRule
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_limits import (
    Bounds,
    RequestedImage,
    check_images,
    check_request,
    model_default,
)
from turbofit.gateway.limits.sharing import hold_images, request_bounds, within

pytestmark = pytest.mark.slow

OWN_TILES = replace(TILES, client_knobs=False)
ONEVISION = AnyresRule(
    tile_size=384, tokens_per_tile=729, max_dynamic_patch=36, most_tiles=9,
    grids=tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)),
)  # fmt: skip
ALL = [TILES, OWN_TILES, PATCHES, FRAMES, GRIDS, ONEVISION, CANVAS, PAGES, CROSS, SQUARE]
SIZES = st.tuples(st.integers(20, 4500), st.integers(20, 4500)).filter(
    lambda size: max(size) <= 190 * min(size)
)


def bounds(rule, *, images: int = 1, **changes: Any) -> Bounds:
    limits = limits_for(rule, images=images, **changes)
    return Bounds(rule=rule, limits=limits, longest_request_tokens=10**9)


def made(b: Bounds, one: RequestedImage, held, request: dict[str, int]) -> tuple[int, int]:
    """Units and tokens that the engine will make of an image as it is passed on."""
    size = held.resize or one.size
    if held.knobs:
        return units_reaching(b.rule, 0, size, held.knobs), held.tokens
    served = b.rule.with_limit(model_default(b))
    if request:
        bound = {name: value // b.rule.frames for name, value in request.items()}
        served = replace(b.rule, **bound)
    return served.units(*size), served.tokens(*size)


@settings(max_examples=part(60, 3))
@given(
    st.lists(SIZES, min_size=1, max_size=12), st.integers(1, 3), st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip
@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
def test_images_never_take_more_than_the_request(
    rule, sizes, promised, overlay, carries, together
) -> None:
    b = replace(bounds(rule, images=promised), overlay=overlay)
    wanted = [RequestedImage(size=size, carries=carries, by_request=together) for size in sizes]
    shared = hold_images(b, wanted)
    if not within(b, shared.images) or len(sizes) > b.limits.most_images(b.rule):
        with pytest.raises(Refusal):
            check_request(b, shared.images)
        assert len(sizes) > promised
        return
    check_request(b, shared.images)
    taken = [
        made(b, one, held, shared.request) for one, held in zip(wanted, shared.images, strict=True)
    ]
    assert [(held.units, held.tokens) for held in shared.images] == taken
    assert sum(count for count, _ in taken) <= b.limits.units_per_request
    assert sum(tokens for _, tokens in taken) <= b.limits.image_tokens_per_request
    alone = [hold_images(b, [one]).images[0] for one in wanted]
    assert all(held.units <= most.units for held, most in zip(shared.images, alone, strict=True))
    if within(b, alone):
        assert [held.units for held in shared.images] == [held.units for held in alone]


@pytest.mark.parametrize(
    ("sizes", "tiles"),
    [
        ([(448, 448), (448, 5376)], [1, 12]),  # the small one keeps its size
        ([(1792, 1344)] * 2, [5, 7]),  # 2x3 of a thumbnail; the newest has what is left over
        ([(1344, 1344)] * 3, [1, 5, 5]),
        ([(1344, 1344)] * 4, [1, 1, 5, 5]),
        ([(100, 100)] * 13, [1] * 13),
        ([(4000, 4000)] * 13, [1] * 13),
        ([(448, 5376)], [13]),
    ],
)
def test_tiles_are_shared(sizes, tiles) -> None:
    shared = hold_images(bounds(TILES), [RequestedImage(size=size) for size in sizes])
    assert [held.units for held in shared.images] == tiles
    for size, held in zip(sizes, shared.images, strict=True):
        lowered = held.units < TILES.units(*size)
        assert lowered == any("max_dynamic_patch=12->" in word for word in held.lowered)


@settings(max_examples=part(80, 3))
@given(st.lists(SIZES, min_size=2, max_size=20))
def test_pixels_are_lowered_as_little_as_is_needed(sizes) -> None:
    b = bounds(PATCHES)
    shared = hold_images(b, [RequestedImage(size=size) for size in sizes])
    whole = [PATCHES.units(*size) for size in sizes]
    got = [held.units for held in shared.images]
    if sum(whole) <= b.limits.units_per_request:
        assert got == whole
        return
    # Rounding to whole windows loses a row and a column of an image at the most.
    assert sum(got) > 0.9 * b.limits.units_per_request
    kept = [now for now, all_of_it in zip(got, whole, strict=True) if now == all_of_it]
    cut = [now for now, all_of_it in zip(got, whole, strict=True) if now < all_of_it]
    # The largest first: what was cut is about as large as what was kept, and not smaller.
    assert not kept or max(kept) <= max(held.knobs["max_pixels"] for held in shared.images) / 196
    assert cut


def test_more_images_than_units_are_refused_with_number_and_limit() -> None:
    b = bounds(TILES)
    assert b.limits.most_images(b.rule) == 13
    check_images(b, 13)
    with pytest.raises(Refusal, match="14 images in a request, the limit is 13"):
        check_images(b, 14)
    kinds = (PATCHES, SQUARE, CROSS, PAGES, GRIDS)
    most = [bounds(rule).limits.most_images(rule) for rule in kinds]
    assert most == [64, 1, 1, 8, 2]
    assert bounds(PATCHES, images=100).limits.most_images(PATCHES) == 100
    assert bounds(SQUARE, images=3).limits.most_images(SQUARE) == 3


def test_strips_that_cannot_be_small_enough_are_refused_with_number_and_limit() -> None:
    b = bounds(PATCHES, units_per_request=400, units_per_image=400)
    shared = hold_images(b, [RequestedImage(size=(4000, 21))] * 8)
    with pytest.raises(Refusal, match=r"\d+ vision patches in a request, the limit is 400"):
        check_request(b, shared.images)


def test_a_client_that_asks_for_less_keeps_it_and_leaves_more_to_others() -> None:
    wanted = [
        RequestedImage(size=(4000, 3000), options={"max_dynamic_patch": 1}),
        RequestedImage(size=(448, 5376)),
    ]
    first, second = hold_images(bounds(TILES), wanted).images
    assert (first.units, first.lowered) == (1, ())
    assert second.units == 12


def test_pixel_bounds_of_all_images_go_into_the_request() -> None:
    b = bounds(FRAMES)
    one = RequestedImage(size=(1000, 800), by_request=True)
    assert hold_images(b, [one]).request == {}
    parameters = request_bounds(b, {"max_pixels": 400_000, "min_pixels": "x", "other": 1})
    assert parameters == {"max_pixels": 200_000}  # of one of two frames
    shared = hold_images(b, [replace(one, options=parameters)])
    assert shared.request == {"min_pixels": 6272 * 2, "max_pixels": 400_000}
    assert shared.images[0].lowered == ()
    beyond = request_bounds(b, {"max_pixels": 10**12})
    (held,) = hold_images(b, [replace(one, size=(4000, 4000), options=beyond)]).images
    assert held.lowered == ("max_pixels=500000000000->4816896",)


@pytest.mark.parametrize("rule", [OWN_TILES, TILES, PATCHES, FRAMES, ONEVISION, CANVAS])
def test_where_nothing_can_be_carried_pictures_are_resized(rule) -> None:
    b = bounds(rule)
    shared = hold_images(b, [RequestedImage(size=(4000, 3000), carries=False)] * 3)
    check_request(b, shared.images)
    for held in shared.images:
        assert held.knobs == {}
        assert held.resize is not None
        assert held.resize[0] < 4000
        assert f"image=4000x3000->{held.resize[0]}x{held.resize[1]}" in held.lowered
