"""Rules without knobs: grids, cross attention, fixed squares and bounds of several frames."""

from __future__ import annotations

import json
import random

import pytest

from tests.support.checkpoints_llava import make_llava
from tests.support.gateway import limits_for, plan_for
from tests.support.plans import model, plausible_plan
from turbofit.core.images import AnyresRule, CanvasRule, CrossRule, HdRule, PatchRule, TileRule
from turbofit.core.plan import Plan
from turbofit.core.struct import decode, to_json
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_limits import (
    RequestedImage,
    bounds_of,
    check_request,
    hold_image,
)
from turbofit.gateway.overlay import edits, overlay
from turbofit.launch.engine.worst_requests import worst_image, worst_image_tokens, worst_request
from turbofit.model.source import resolve_model

GRIDS = AnyresRule(
    tile_size=336, tokens_per_tile=576, max_dynamic_patch=4,
    grids=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)  # fmt: skip
CROSS = CrossRule(tile_size=560, tokens_per_tile=1601, max_dynamic_patch=4, thumbnail=False)
SQUARE = TileRule(
    tile_size=336, tokens_per_tile=576, max_dynamic_patch=1, thumbnail=False, dynamic=False,
    client_knobs=False,
)  # fmt: skip
FRAMES = PatchRule(
    patch_size=14, merge=2, min_pixels=6272, max_pixels=4816896, client_knobs=False, frames=2,
    enlarge=True,
)  # fmt: skip
PAGES = HdRule(tile_size=336, tokens_per_tile=144, max_dynamic_patch=16)
CANVAS = CanvasRule(tile_size=336, tokens_per_tile=145, max_dynamic_patch=16)
RULES = [GRIDS, CROSS, SQUARE, FRAMES, PAGES, CANVAS]
LIMITS = {
    GRIDS: [4, 3, 2, 1],
    CROSS: [4],
    SQUARE: [1],
    FRAMES: [4816896, 784 * 400],
    PAGES: [16, 4, 1],
    CANVAS: [16, 7, 1],
}


@pytest.mark.parametrize("rule", RULES)
def test_a_plan_keeps_its_rule_in_json(rule):
    plan = plan_for(rule)
    assert decode(to_json(plan), Plan, what="plan") == plan


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("on_overlay", [True, False])
def test_no_image_passes_the_plan_and_no_knob_is_sent(rule, on_overlay):
    rng = random.Random(3)
    parameters = {
        "max_dynamic_patch": 99,
        "max_pixels": 10**9,
        "min_pixels": 10**9,
        "detail": "high",
    }
    for limit in LIMITS[rule]:
        bounds = bounds_of(plan_for(rule, limit=limit, images=1), overlay=on_overlay)
        served = rule.with_limit(limit) if on_overlay else rule
        for _ in range(60):
            size = rng.randrange(10, 1500), rng.randrange(10, 1500)
            try:
                limited = hold_image(bounds, RequestedImage(size=size, options=parameters))
            except Refusal as refusal:
                refused = refusal.reason
                limited = None
            if limited is None:
                assert (refused, on_overlay) == ("image_too_large", False)
                continue
            assert limited.knobs == {}
            assert on_overlay or limited.resize is None or limit < LIMITS[rule][0]
            size = limited.resize or size
            assert limited.units == served.units(*size) <= bounds.limits.units_per_image
            assert limited.tokens == served.tokens(*size)
            check_request(bounds, [limited])


@pytest.mark.parametrize("rule", RULES)
def test_the_worst_request_reaches_the_plan(rule):
    for limit in LIMITS[rule]:
        plan = plan_for(rule, limit=limit, images=2)
        image = worst_image(plan)
        assert rule.units(*image.size, limit) == plan.limits.units_per_image
        assert image.knobs == {}
        assert worst_image_tokens(plan) == plan.limits.image_tokens_per_request
        parts = worst_request(plan, "m").body["messages"][0]["content"]
        assert sum(part["type"] == "image_url" for part in parts) == 2
        assert rule.units(*rule.worst_size(limit), limit) == rule.worst_units(limit)


def test_fewer_grids_are_written_for_model_and_processor(tmp_path):
    folder = make_llava(tmp_path / "llava-v1.6-7b-hf", "llava_next")
    resolved = resolve_model(str(folder))
    plan = plausible_plan(model=resolved, limits=limits_for(resolved.image_rule, limit=2))
    with overlay(plan, tmp_path / "o") as over:
        grids = [[336, 672], [672, 336]]
        for name in ("config.json", "preprocessor_config.json"):
            assert json.loads((over / name).read_text())["image_grid_pinpoints"] == grids
        rule = resolve_model(str(over)).image_rule
        assert rule.worst_units() == 3
    assert edits(folder, resolved.image_rule, limits_for(resolved.image_rule, limit=4)) == {}
    (folder / "preprocessor_config.json").write_text("{}")
    changed = edits(folder, resolved.image_rule, limits_for(resolved.image_rule, limit=1))
    assert changed["config.json"]["image_grid_pinpoints"] == [[336, 336]]
    assert changed["config.json"]["vision_config"]["image_size"] == 336


def test_fewer_crops_are_written_for_the_processor(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"num_crops": 16}')
    changed = edits(tmp_path, PAGES, limits_for(PAGES, limit=4))
    assert changed == {"preprocessor_config.json": {"num_crops": 4}}


def test_a_smaller_canvas_is_written_for_the_processor(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"max_patches": 16}')
    changed = edits(tmp_path, CANVAS, limits_for(CANVAS, limit=4))
    assert changed == {"preprocessor_config.json": {"max_patches": 4}}
    assert edits(tmp_path, CANVAS, limits_for(CANVAS, limit=16)) == {}


def test_bounds_of_two_frames_are_written_as_two(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    plan = plausible_plan(model=model(image_rule=FRAMES), limits=limits_for(FRAMES, limit=78400))
    (changed,) = edits(tmp_path, FRAMES, plan.limits).values()
    assert changed["size"] == {"shortest_edge": 12544, "longest_edge": 156800}
