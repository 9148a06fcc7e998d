"""Bounds of two plans at once: whatever they admit, both plans admit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.gateway import PATCHES, TILES, ask, chat, gateway, image_part, plan_for
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import KvCache
from turbofit.gateway.limits.intersect import intersect
from turbofit.gateway.limits.request_limits import (
    Bounds,
    bounds_of,
    check_request,
    hold_image,
    model_default,
)

pytestmark = pytest.mark.slow

OWN = replace(TILES, client_knobs=False)
OWN_PATCHES = replace(PATCHES, client_knobs=False)
NUMBERS = st.integers(1, 40)


@st.composite
def bounds(draw, rule) -> Bounds:
    limits = [None, 1, 4, 6, 12, 24] if not isinstance(rule, PatchRule) else [
        None, 50_000, 602_112, 2_000_000, 12_845_056,
    ]  # fmt: skip
    plan = plan_for(
        rule,
        limit=draw(st.sampled_from(limits)),
        images=draw(st.integers(1, 4)),
        n=draw(st.integers(1, 3)),
        bytes_per_image=draw(st.integers(1, 8)) << 20,
        bytes_per_body=draw(st.integers(1, 40)) << 20,
    )
    made = bounds_of(plan, overlay=draw(st.booleans()))
    unit = made.limits.units_per_image
    gate = draw(st.one_of(st.none(), st.integers(unit, 5 * unit)))
    longest = draw(st.integers(2000, 60_000))
    has = draw(st.integers(0, 20)) > 0
    return replace(
        made, gate=gate, longest_request_tokens=longest, rule=rule if has else None,
        kv=draw(st.builds(KvCache, tokens=NUMBERS, longest=NUMBERS)),
        bytes_per_unit=draw(NUMBERS), watches=draw(st.booleans()),
    )  # fmt: skip


IMAGES = st.lists(
    st.tuples(
        st.tuples(st.integers(30, 2000), st.integers(30, 2000)),
        st.dictionaries(
            st.sampled_from(["max_dynamic_patch", "detail", "min_pixels", "max_pixels"]),
            st.sampled_from([1, 6, 40, 3136, 1_000_000, 10**8, "low", "high", None]),
        ),
        st.booleans(),
    ),
    max_size=2,
)


@settings(max_examples=400, deadline=None)
@given(st.data(), IMAGES, st.integers(1, 2))
@pytest.mark.parametrize("rule", [TILES, PATCHES, OWN, OWN_PATCHES])
def test_what_the_intersect_admits_both_admit(rule, data, images, n) -> None:
    a, b = data.draw(bounds(rule)), data.draw(bounds(rule))
    both = intersect(a, b)
    assert both == intersect(b, a)
    for one in (a, b):
        assert both.beside_images <= one.beside_images
        assert both.limits.bytes_per_body <= one.limits.bytes_per_body
        assert both.limits.bytes_per_image <= one.limits.bytes_per_image
        assert both.bytes_per_unit >= one.bytes_per_unit
        if one.gate is not None:
            assert both.kv.tokens <= one.kv.tokens
            assert both.kv.longest >= one.kv.longest
        assert one.gate is None or both.gate <= one.gate
        assert one.watches or not both.watches
    try:
        held = [hold_image(both, size, asked, carries=c) for size, asked, c in images]
        check_request(both, held, n=n)
    except Refusal:
        return
    for one in (a, b):
        # As it is passed on: an image carries the meet's parameters, or none at all.
        again = [
            hold_image(
                one, now.resize or size, now.knobs if c and rule.client_knobs else {}, carries=c
            )
            for (size, _, c), now in zip(images, held, strict=True)
        ]
        check_request(one, again, n=n)
        for now, then in zip(held, again, strict=True):
            # What is counted against the gates is at least what this plan's engine will make of it.
            assert then.units <= now.units
            assert then.tokens <= now.tokens
            assert then.knobs == now.knobs


def test_a_plan_meets_itself_unchanged() -> None:
    for rule in (TILES, PATCHES):
        own = bounds_of(plan_for(rule))
        both = intersect(own, own)
        assert replace(both, default=None) == replace(
            own,
            limits=replace(
                own.limits,
                max_dynamic_patch=12 if rule is TILES else None,
                max_pixels_per_image=None if rule is TILES else rule.max_pixels,
            ),
        )
        assert model_default(both) == model_default(own)


def test_text_only_meets_images_in_text_only() -> None:
    own = bounds_of(plan_for())
    both = intersect(own, replace(own, rule=None))
    assert (both.rule, both.limits.vision_unit) == (None, None)


def test_different_models_do_not_intersect() -> None:
    with pytest.raises(UsageError, match="different models"):
        intersect(bounds_of(plan_for(TILES)), bounds_of(plan_for(PATCHES)))


def test_a_gateway_holds_requests_to_both() -> None:
    both = intersect(bounds_of(plan_for(limit=4)), bounds_of(plan_for(limit=12, images=1)))
    app, upstream = gateway()
    app.bounds = both
    assert ask(app, body=chat(image_part(1792, 1344, detail="high"))).status == 200
    part = upstream.bodies[0]["messages"][0]["content"][1]
    assert part["image_url"]["max_dynamic_patch"] == 4
    assert ask(app, body=chat(image_part(), image_part())).status == 200
    assert ask(app, body=chat(*[image_part()] * 11)).status == 400
