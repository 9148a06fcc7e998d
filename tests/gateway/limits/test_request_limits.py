from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.judge import units_reaching
from tests.support.gateway import (
    PATCHES,
    TILES,
    limits_for,
    plan_for,
    promise_for,
)
from turbofit.core.images import TileRule
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits import request_limits
from turbofit.gateway.limits.request_body import read_body
from turbofit.gateway.limits.request_limits import (
    Bounds,
    EngineBounds,
    RequestedImage,
    check_images,
    check_request,
    model_default,
)
from turbofit.serving.plan_gateway import bounds_of

sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
values: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.integers(-5, 200), st.integers(), st.booleans(), st.floats(), st.text(max_size=6),
    st.sampled_from(["24", "1e9", "low", "high", 10**40, 1.5, [], {}]),
)  # fmt: skip
details = st.one_of(values, st.sampled_from(["low", "medium", "high", "auto"]))


def bounds(rule=TILES, *, overlay=True, longest=10**9, **changes) -> Bounds:
    promise = promise_for(limits_for(rule, **changes), longest)
    return Bounds(rule=rule, promise=promise, overlay=overlay)


def hold_image(b: Bounds, size, parameters, *, carries=True):
    image = RequestedImage(size=size, options=parameters, carries=carries)
    return request_limits.hold_image(b, image)


def held_or_refused(*words: Any, **keywords: Any):
    with suppress(Refusal):
        return hold_image(*words, **keywords)


@given(sizes, values, details, st.integers(1, 30), st.integers(1, 31), st.booleans())
def test_no_tile_passes_the_plan(size, patch, detail, planned, most, overlay) -> None:
    b = bounds(limit=planned, overlay=overlay, units_per_image=most)
    limited = hold_image(b, size, {"max_dynamic_patch": patch, "detail": detail, "other": 1})
    assert set(limited.knobs) == {"max_dynamic_patch"}
    given_patch = limited.knobs["max_dynamic_patch"]
    assert type(given_patch) is int
    assert given_patch <= planned
    assert units_reaching(TILES, 10**3, size, limited.knobs) == limited.units <= most
    assert limited.tokens == TILES.unit_tokens(limited.units)


@given(sizes, values, values, st.integers(28 * 28, 20_000_000), st.booleans())
def test_no_patch_passes_the_plan(size, low, high, planned, overlay) -> None:
    b = bounds(PATCHES, limit=planned, overlay=overlay)
    limited = held_or_refused(b, size, {"min_pixels": low, "max_pixels": high})
    if limited is None:
        assert max(size) > 200 * min(size) or planned < 160_000
        return
    assert 0 < limited.knobs["min_pixels"] <= limited.knobs["max_pixels"] <= planned
    assert units_reaching(PATCHES, 10**9, size, limited.knobs) == limited.units
    assert limited.units <= b.limits.units_per_image
    assert limited.tokens == PATCHES.unit_tokens(limited.units)


@given(sizes, st.integers(1, 13), st.booleans(), st.booleans())
def test_where_nothing_can_be_carried_the_default_decides(size, planned, overlay, hf) -> None:
    rule: TileRule = msgspec.structs.replace(TILES, client_knobs=not hf)
    b = bounds(rule, limit=planned, overlay=overlay)
    limited = held_or_refused(b, size, {"detail": "high"}, carries=False)
    at_default = rule.units(*size, planned if overlay else 12)
    most = rule.worst_units(planned)
    assert limited is not None
    assert limited.knobs == {}
    assert limited.lowered[0] == "detail=high->default"
    if at_default <= most:
        assert (limited.units, limited.resize) == (at_default, None)
    else:
        assert not overlay
        assert limited.units == rule.units(*limited.resize) <= most


def test_what_is_within_the_plan_stays_and_is_not_said() -> None:
    for parameters, limit in (
        ({}, 12), ({"detail": "low"}, 6), ({"max_dynamic_patch": 3}, 3), ({"detail": "medium"}, 12),
        ({"detail": "auto"}, 12), ({"detail": "low", "max_dynamic_patch": 7}, 7),
    ):  # fmt: skip
        limited = hold_image(bounds(), (1792, 1344), parameters)
        assert (limited.knobs["max_dynamic_patch"], limited.lowered) == (limit, ())
    smaller = {"min_pixels": 4000, "max_pixels": 100_000}
    limited = hold_image(bounds(PATCHES), (1000, 1000), smaller)
    assert (limited.knobs, limited.lowered) == (smaller, ())


def test_lowering_is_said() -> None:
    for parameters, change in (
        ({"max_dynamic_patch": 24}, "max_dynamic_patch=24->12"),
        ({"max_dynamic_patch": "4096"}, "max_dynamic_patch=4096->12"),
        ({"max_dynamic_patch": 1e9}, "max_dynamic_patch=1000000000.0->12"),
        ({"max_dynamic_patch": 10**40}, "max_dynamic_patch=huge->12"),
        ({"detail": "high"}, "detail=high->12"),
    ):
        assert hold_image(bounds(), (1792, 1344), parameters).lowered == (change,)


def test_both_pixel_bounds_are_lowered_and_said() -> None:
    limited = hold_image(bounds(PATCHES), (100, 100), {"min_pixels": 10**8})
    assert limited.lowered == ("min_pixels=100000000->12845056",)
    limited = hold_image(bounds(PATCHES, limit=784_000), (4000, 4000), {"max_pixels": 9e9})
    assert limited.knobs == {"min_pixels": 3136, "max_pixels": 784_000}
    # Words in the header cannot break it.
    limited = hold_image(bounds(limit=3), (1, 3), {"max_dynamic_patch": "99\r\nx: y"})
    assert all(word.isprintable() and "," not in word for word in limited.lowered)


def test_a_plan_for_small_images_lowers_only_the_larger_ones() -> None:
    b = bounds(units_per_image=9)
    assert hold_image(b, (1920, 1080), {}).knobs == {"max_dynamic_patch": 12}
    limited = hold_image(b, (800, 600), {})
    assert limited.knobs == {"max_dynamic_patch": 8}
    assert limited.lowered == ("max_dynamic_patch=12->8",)
    # The overlay makes a larger plan the default.
    assert model_default(bounds(limit=24)) == 24
    assert model_default(bounds(limit=24, overlay=False)) == 12
    assert hold_image(bounds(limit=24), (24, 1), {}).units == 25


def test_counts_are_refused_with_number_and_limit() -> None:
    b = bounds(images=2, n=4, longest=4000)
    image = hold_image(b, (448, 5376), {})
    check_request(b, [image], n=4)
    # Text waits in the engine without memory, as LMDeploy's own requests do.
    check_request(b, [], n=128)
    for images, copies, key, number, limit in (
        ([image] * 27, 1, "too_many_images", 27, 26), ([image], 5, "n_over_limit", 5, 4),
        ([], 129, "n_over_limit", 129, 128),
        ([image] * 2, 1, "images_over_limit:request", 6657, 4000),
    ):  # fmt: skip
        with pytest.raises(Refusal) as caught:
            check_request(b, images, n=copies)
        said = caught.value
        assert (said.status, said.key) == (400, key)
        assert {number, limit} <= {*said.facts.values()}


def test_copies_intersect_in_one_forward() -> None:
    b = msgspec.structs.replace(bounds(n=9), engines=(EngineBounds(units=39),))
    image = hold_image(b, (448, 5376), {})
    check_request(b, [image], n=3)
    with pytest.raises(Refusal) as caught:
        check_request(b, [image], n=4)
    facts = caught.value.facts
    assert (caught.value.key, facts["number"], facts["limit"]) == ("n_over_limit", 52, 39)


def test_no_images_without_a_plan_for_them() -> None:
    b = bounds_of(plan_for(vision_unit=None))
    assert b.rule is None
    for refused in (lambda: check_images(b, 1), lambda: hold_image(b, (9, 9), {})):
        with pytest.raises(Refusal, match="has no images"):
            refused()


def refused(kind: Any, body: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_body(kind, body)
    assert caught.value.status == 400
    return caught.value
