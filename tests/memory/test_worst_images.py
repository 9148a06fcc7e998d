"""Images that meet in one forward, counted as the engines' schedulers cut a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from turbofit import api
from turbofit.core.images.rule import DummyImage
from turbofit.core.plan import Plan
from turbofit.memory.engines import engine_of
from turbofit.memory.worst_images import (
    Image,
    Meeting,
    Text,
    over_edges,
    pictures,
    side_by_side,
)

TEXT = Text(before=40, around=2, after=10)


def any_image(units: int, tokens: int) -> Image | None:
    """Of tiles with 256 tokens each."""
    units = min(units, tokens // 256)
    return Image(units, 256 * units) if units > 0 else None


def small_image(units: int, tokens: int) -> Image | None:
    """Of at most 13 tiles."""
    return any_image(min(units, 13), tokens)


def met_cut(met: Meeting, forward: int, text: Text = TEXT) -> int:
    """Units of the fullest forward, where images are cut and count in each of their forwards."""
    place, units = text.before, dict[int, int]()
    for image in met.images:
        place += text.around // 2
        for number in range(place // forward, (place + image.tokens - 1) // forward + 1):
            units[number] = units.get(number, 0) + image.units
        place += image.tokens + text.around - text.around // 2
    return max(units.values(), default=0)


def met_whole(met: Meeting, forward: int, text: Text) -> int:
    """Units of the fullest chunk of a prompt that is cut between its images only."""
    limit = max(forward, *(image.tokens + text.around for image in met.images))
    start, place, units, most = 0, text.before, 0, 0
    for image in met.images:
        if place + image.tokens + text.around > start + limit:
            start, units = place, 0
        place, units = place + image.tokens + text.around, units + image.units
        most = max(most, units)
    return most


def test_side_by_side_the_largest_come_first() -> None:
    met = side_by_side(small_image, 99, 8192, Text(1))
    assert [image.units for image in met.images] == [13, 13, 6]
    assert (met.units, side_by_side(small_image, 20, 8192, Text(1)).units) == (32, 20)
    # Each needs its text.
    assert [i.units for i in side_by_side(small_image, 99, 8192, Text(1, around=8)).images] == [
        13, 13, 5
    ]  # fmt: skip


@pytest.mark.parametrize("make", [any_image, small_image])
@pytest.mark.parametrize("forward", [1040, 4104, 8320])
@pytest.mark.parametrize("room", [3400, 5000, 10240, 32768])
@pytest.mark.parametrize("slack", [0, 15])
def test_at_the_edges_of_a_forward_two_images_are_cut(make, forward, room, slack) -> None:
    bound = min(forward // 256 + 2 * 13, room // 256)
    text = Text(before=40, around=2, slack=slack)
    met = over_edges(make, bound, room, forward, text)
    assert text.before + sum(image.tokens + 2 for image in met.images) <= room
    for wrong in {-slack, 0, slack}:
        assert met_cut(met, forward, text._replace(before=text.before + wrong)) >= met.units
    # Images before the edge take room, too, where it is short.
    assert met.units >= bound - (2 if room == 32768 else 6)
    assert met_cut(met, forward) <= bound


def test_a_prompt_without_room_has_no_image() -> None:
    assert over_edges(small_image, 13, 100, 8192, TEXT) == Meeting(0, [])
    assert side_by_side(small_image, 13, 100, TEXT) == Meeting(0, [])


def whole(plan: Plan, units: int, tokens: int) -> Image | None:
    rule = plan.model.image_rule
    assert rule is not None
    units = min(units, rule.units_within(tokens)) // rule.unit_step * rule.unit_step
    return Image(units, rule.unit_tokens(units)) if units else None


@pytest.mark.parametrize(
    ("model", "on", "options"),
    [
        ("internvl2-8b", "1xrtx3090", {}),
        ("internvl2-8b", "1xrtx3090", {"max_prefill_token_num": 8192, "max_batch_size": 128}),
        ("internvl2-8b", "1xrtx3090", {"max_prefill_token_num": 2048}),
        ("internvl2-8b", "1xrtx3090", {"enable_prefix_caching": True}),
        ("internvl2-8b", "1xrtx3090", {"images": 4, "max_batch_size": 8}),
        ("internvl2-40b-awq", "1xa100-40g", {}),  # a context of 8,192, less than a forward
        ("internvl3.5-4b", "1xt4", {}),
        ("qwen2-vl-7b", "1xrtx3090", {}),
        ("qwen2.5-vl-7b", "1xv100-32g", {}),  # a context that three images fit
        ("qwen2-vl-2b", "1xrtx3060", {"max_batch_size": 2}),
        ("qwen2-vl-2b", "1xrtx3060", {"queue_images": True}),
    ],
)
def test_turbomind_meets_all_that_its_account_pays_for(
    model: str, on: str, options: dict[str, Any]
) -> None:
    options = {"tp": 1, "replicas": 1, "engine": "turbomind", "queue_images": False, **options}
    plan = api.plan(model, on=on, **options)
    engine, paid = engine_of(plan), plan.engines[0].units_per_forward
    forward = engine.forward_tokens(plan.engines[0].settings)
    met = engine.worst_images(
        plan.promise, plan.engines[0], lambda u, t: whole(plan, u, t), Text(1, after=3)
    )
    assert met_cut(met, forward, Text(1)) == met.units
    assert 0.99 * (paid - 1) <= met.units <= paid
    if plan.engines[0].settings.enable_prefix_caching:
        return  # images that are seen again meet in other ways
    most = plan.promise.limits.units_per_image
    clients = engine.worst_images(
        plan.promise, plan.engines[0], lambda u, t: whole(plan, min(u, most), t), Text(1, after=3)
    )
    assert met_cut(clients, forward, Text(1)) == clients.units
    assert 0.96 * (paid - 1) <= clients.units <= paid


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
def test_of_the_pytorch_engine_nearly_as_many_whole_images_meet(
    model: str, options: dict[str, Any], share: float
) -> None:
    options = {"max_prefill_token_num": 8192, **options}
    plan = api.plan(model, on="1xrtx3060", engine="pytorch", **options)
    rule, paid = plan.model.image_rule, plan.engines[0].units_per_forward
    assert rule is not None
    size = plan.workload.image_size or rule.worst_size(plan.promise.limits.image_limit)
    make, text = pictures(rule, DummyImage(size, {}), with_fields=True), Text(33, 8, 5)
    met = engine_of(plan).worst_images(plan.promise, plan.engines[0], make, text)
    assert max(image.units for image in met.images) <= plan.promise.limits.units_per_image
    assert met_whole(met, plan.engines[0].settings.max_prefill_token_num, text) == met.units
    assert share * paid <= met.units <= paid
