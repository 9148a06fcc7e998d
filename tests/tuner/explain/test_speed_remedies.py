"""A plan that fits tells what speed a shorter context would give, where that is clearly more."""

from __future__ import annotations

import turbofit


def test_a_shorter_context_is_offered_with_its_figure() -> None:
    on = "4xrtx3090:free=20GiB"
    plan = turbofit.plan("internvl2-8b", on=on)
    assert plan.settings.session_len == 32_768  # the promise comes before speed
    (remedy,) = plan.remedies
    assert remedy.change == "--context 16384"
    shorter = turbofit.plan("internvl2-8b", on=on, context=16_384)
    assert plan.throughput is not None
    assert shorter.throughput is not None
    gained, had = (one.throughput.requests_per_second for one in (shorter, plan))
    assert gained > 1.1 * had
    assert remedy.effect == f"{gained:.3g} requests/s by the forecast, not {had:.3g}"


def test_a_context_that_leaves_room_for_one_request_is_told() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xl4:free=8GiB", queue_images=False)
    assert plan.settings.max_batch_size == 1
    (remedy,) = plan.remedies
    assert remedy.change == "--context 16384"


def test_nothing_is_offered_where_nothing_is_gained_or_the_context_was_asked_for() -> None:
    assert not turbofit.plan("internvl2-8b", on="4xrtx3090").remedies
    asked = turbofit.plan("internvl2-8b", on="4xrtx3090:free=20GiB", context=32_768)
    assert asked.fits
    assert not asked.remedies


def test_pages_as_its_tool_sends_them_are_offered_with_options_that_hold() -> None:
    plan = turbofit.plan("olmocr-2-7b", on="1xl4")
    assert plan.limits.units_per_image == 65_536  # what clients may send stays theirs to lower
    remedy = plan.remedies[0]
    assert remedy.change == "--image-size 1288x1288 --context 16384"
    assert remedy.effect.endswith("for pages as olmOCR sends them")
    pages = turbofit.plan("olmocr-2-7b", on="1xl4", image_size=(1288, 1288), context=16_384)
    assert pages.throughput is not None
    assert remedy.effect.startswith(f"{pages.throughput.requests_per_second:.3g} requests/s")
    rule = pages.model.image_rule
    assert rule is not None
    for width, height in ((1288, 1288), (995, 1288), (911, 1288), (1288, 724)):
        assert rule.units(width, height, rule.checkpoint_limit) <= pages.limits.units_per_image
    longer = turbofit.plan("olmocr-2-7b", on="1xl4", context=20_000)
    assert longer.remedies[0].change == "--image-size 1288x1288"


def test_pages_are_not_offered_where_images_are_settled_or_the_model_reads_no_documents() -> None:
    settled = ({"image_size": (2000, 2000)}, {"max_pixels": 4_000_000}, {"images": 0})
    for asked in settled:
        plan = turbofit.plan("olmocr-2-7b", on="1xl4", **asked)
        assert not [one for one in plan.remedies if "--image-size" in one.change]
    same = turbofit.plan("qwen2.5-vl-7b", on="1xl4")
    assert not [one for one in same.remedies if "--image-size" in one.change]


def test_a_gain_that_host_memory_does_not_hold_is_not_offered() -> None:
    """Engines of a shorter context would be four, for which this host has no memory."""
    on = "4xrtx3090:free=20GiB,ram=12GiB"
    plan = turbofit.plan("internvl2-8b", on=on)
    assert plan.fits
    assert not plan.remedies
    shorter = turbofit.plan("internvl2-8b", on=on, context=16_384)
    assert plan.throughput is not None
    assert shorter.throughput is not None
    gained, had = (one.throughput.requests_per_second for one in (shorter, plan))
    assert gained <= had
