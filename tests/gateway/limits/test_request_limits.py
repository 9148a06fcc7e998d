from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.judge import units_reaching
from tests.support.gateway import PATCHES, TILES, limits_for, plan_for
from turbofit.core.images import TileRule
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits import request_limits
from turbofit.gateway.limits.gate import UNSTATED, KvCache
from turbofit.gateway.limits.request_limits import (
    Bounds,
    RequestedImage,
    bounds_of,
    check_images,
    check_request,
    model_default,
)

sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
values: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.integers(-5, 200), st.integers(), st.booleans(), st.floats(), st.text(max_size=6),
    st.sampled_from(["24", "1e9", "low", "high", 10**40, 1.5, [], {}]),
)  # fmt: skip
details = st.one_of(values, st.sampled_from(["low", "medium", "high", "auto"]))


def bounds(rule=TILES, *, overlay=True, longest=10**9, **changes) -> Bounds:
    return Bounds(
        rule=rule,
        limits=limits_for(rule, **changes),
        longest_request_tokens=longest,
        overlay=overlay,
    )


def hold_image(b: Bounds, size, parameters, *, carries=True):
    image = RequestedImage(size=size, options=parameters, carries=carries)
    return request_limits.hold_image(b, image)


def held_or_refused(b: Bounds, size, parameters, *, carries=True):
    try:
        return hold_image(b, size, parameters, carries=carries)
    except Refusal:
        return None


@given(sizes, values, details, st.integers(1, 30), st.integers(1, 31), st.booleans())
def test_no_tile_passes_the_plan(size, patch, detail, planned, most, overlay) -> None:
    b = bounds(limit=planned, overlay=overlay, units_per_image=most)
    parameters = {"max_dynamic_patch": patch, "detail": detail, "other": 1}
    limited = held_or_refused(b, size, parameters)
    if limited is None:
        return
    assert set(limited.knobs) == {"max_dynamic_patch"}
    assert type(limited.knobs["max_dynamic_patch"]) is int
    reached = units_reaching(TILES, 10**3, size, limited.knobs)
    assert reached == limited.units <= most
    assert limited.knobs["max_dynamic_patch"] <= planned
    assert limited.tokens == reached * 256


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
        assert limited.knobs["max_dynamic_patch"] == limit
        assert limited.lowered == ()
    smaller = {"min_pixels": 4000, "max_pixels": 100_000}
    limited = hold_image(bounds(PATCHES), (1000, 1000), smaller)
    assert (limited.knobs, limited.lowered) == (smaller, ())


@pytest.mark.parametrize(
    ("parameters", "change"),
    [
        ({"max_dynamic_patch": 24}, "max_dynamic_patch=24->12"),
        ({"max_dynamic_patch": "4096"}, "max_dynamic_patch=4096->12"),
        ({"max_dynamic_patch": 1e9}, "max_dynamic_patch=1000000000.0->12"),
        ({"max_dynamic_patch": 10**40}, "max_dynamic_patch=huge->12"),
        ({"detail": "high"}, "detail=high->12"),
    ],
)
def test_lowering_is_said(parameters, change) -> None:
    assert hold_image(bounds(), (1792, 1344), parameters).lowered == (change,)


def test_both_pixel_bounds_are_lowered_and_said() -> None:
    limited = hold_image(bounds(PATCHES), (100, 100), {"min_pixels": 10**8})
    assert limited.lowered == ("min_pixels=100000000->12845056",)
    limited = hold_image(bounds(PATCHES, limit=784_000), (4000, 4000), {"max_pixels": 9e9})
    assert limited.knobs == {"min_pixels": 3136, "max_pixels": 784_000}


def test_words_in_the_header_cannot_break_it() -> None:
    limited = hold_image(bounds(limit=3), (1, 3), {"max_dynamic_patch": "99\r\nx: y"})
    assert all(c.isprintable() and c not in "\r\n," for word in limited.lowered for c in word)


def test_a_plan_for_small_images_lowers_only_the_larger_ones() -> None:
    b = bounds(units_per_image=9)
    assert hold_image(b, (1920, 1080), {}).knobs == {"max_dynamic_patch": 12}
    limited = hold_image(b, (800, 600), {})
    assert limited.knobs == {"max_dynamic_patch": 8}
    assert limited.lowered == ("max_dynamic_patch=12->8",)


def test_the_overlay_makes_a_larger_plan_the_default() -> None:
    assert model_default(bounds(limit=24)) == 24
    assert model_default(bounds(limit=24, overlay=False)) == 12
    assert hold_image(bounds(limit=24), (24, 1), {}).units == 25


def test_counts_are_refused_with_number_and_limit() -> None:
    b = bounds(images=2, n=4, longest=4000)
    image = hold_image(b, (448, 5376), {})
    check_request(b, [image], n=4)
    # Text waits in the engine without memory, as LMDeploy's own requests do.
    check_request(b, [], n=128)
    for keywords, words in [
        ({"images": [image] * 27}, ("27 images", "limit is 26")),
        ({"images": [image], "n": 5}, ("5 copies", "4")),
        ({"images": [], "n": 129}, ("129 copies", "128")),
        ({"images": [image, image]}, ("6657", "4000")),
    ]:
        images = keywords.pop("images")
        with pytest.raises(Refusal) as caught:
            check_request(b, images, **keywords)
        assert caught.value.status == 400
        assert all(word in caught.value.message for word in words), caught.value.message


def test_copies_intersect_in_one_forward() -> None:
    b = msgspec.structs.replace(bounds(n=9), gate=39)
    image = hold_image(b, (448, 5376), {})
    check_request(b, [image], n=3)
    with pytest.raises(Refusal, match="52 vision tiles in 4 copies, the limit is 39"):
        check_request(b, [image], n=4)


def test_no_images_without_a_plan_for_them() -> None:
    b = bounds_of(plan_for(vision_unit=None))
    assert b.rule is None
    with pytest.raises(Refusal, match="planned without images"):
        check_images(b, 1)
    with pytest.raises(Refusal, match="planned without images"):
        hold_image(b, (9, 9), {})


def test_the_gate_is_there_only_where_the_plan_paid_less_than_the_engine_could_do() -> None:
    assert bounds_of(plan_for(units_per_forward=20)).gate == 20
    assert bounds_of(plan_for(units_per_forward=10**6)).gate is None


def test_the_cache_counts_only_where_there_is_a_gate_and_it_may_run_out() -> None:
    plan = plan_for(units_per_forward=20)
    assert not plan.may_evict()
    assert bounds_of(plan).kv.tokens == UNSTATED
    more = msgspec.structs.replace(
        plan, settings=msgspec.structs.replace(plan.settings, max_batch_size=1024)
    )
    assert bounds_of(more).kv == KvCache(tokens=plan.kv.tokens, longest=32768, block=64)
    assert bounds_of(plan_for(units_per_forward=10**6)).kv == KvCache()


@given(sizes)
def test_tokens_are_those_of_the_units(size) -> None:
    for rule in (TILES, PATCHES):
        limited = held_or_refused(bounds(rule), size, {})
        if limited is not None:
            assert limited.tokens == rule.unit_tokens(limited.units)
