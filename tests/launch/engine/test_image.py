from __future__ import annotations

import io

import msgspec
import pytest

from tests.support.plans import model, plausible_plan
from turbofit.core.images import PatchRule, TileRule
from turbofit.core.plan import Workload
from turbofit.launch.engine.worst_requests import worst_image, worst_request
from turbofit.load.prompt import png

PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12845056)


def limited(units_per_image: int, **limits: object):
    rule = limits.pop("rule", TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12))
    plan = plausible_plan(model=model(image_rule=rule))
    changed = msgspec.structs.replace(plan.limits, units_per_image=units_per_image, **limits)
    return msgspec.structs.replace(plan, limits=changed)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 7, 11, 12, 24])
def test_the_worst_tiles(most: int) -> None:
    rule = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)
    worst = rule.worst_units(most)
    image = worst_image(limited(worst, max_dynamic_patch=most))
    assert image is not None
    assert rule.units(*image.size, most) == worst


def test_of_equal_grids_the_squarest() -> None:
    image = worst_image(limited(13))
    assert image is not None
    assert image.size == (1792, 1344)


@pytest.mark.parametrize("pixels", [12845056, 1_000_000, 200_704, 401_408])
def test_the_worst_patches(pixels: int) -> None:
    worst = PATCHES.worst_units(pixels)
    plan = limited(
        worst, rule=PATCHES, vision_unit="patch", max_dynamic_patch=None,
        max_pixels_per_image=pixels,
    )  # fmt: skip
    image = worst_image(plan)
    assert image is not None
    assert worst * 0.995 <= PATCHES.units(*image.size, pixels) <= worst


def test_a_promised_size_is_the_worst() -> None:
    plan = plausible_plan(workload=Workload(image_size=(640, 480)))
    image = worst_image(plan)
    assert image is not None
    assert image.size == (640, 480)


def test_text_models_have_no_image_request() -> None:
    plan = plausible_plan(model=model(vision=None, image_rule=None))
    assert worst_image(plan) is None
    assert worst_request(plan, "m") is None


def test_the_request_carries_the_limit_and_all_images() -> None:
    request = worst_request(limited(13, images_per_request=3), "name")
    assert request is not None
    body = request.body
    images = [x for x in body["messages"][0]["content"] if x["type"] == "image_url"]
    assert len(images) == 3
    assert images[0]["image_url"]["max_dynamic_patch"] == 12
    assert body["model"] == "name"
    plan = limited(
        4, rule=PATCHES, vision_unit="patch", max_dynamic_patch=None, max_pixels_per_image=3136
    )
    image = worst_image(plan)
    assert image is not None
    assert image.knobs == {"min_pixels": 3136, "max_pixels": 3136}


@pytest.mark.lmdeploy
@pytest.mark.parametrize("size", [(1, 1), (8, 3), (1793, 1345), (3584, 3584)])
def test_the_png_is_one(size: tuple[int, int]) -> None:
    image = pytest.importorskip("PIL.Image")
    data = png(*size)
    assert len(data) < 8192
    with image.open(io.BytesIO(data)) as decoded:
        assert decoded.size == size
        assert decoded.convert("RGB").getextrema() == ((0, 0), (0, 0), (0, 0))
