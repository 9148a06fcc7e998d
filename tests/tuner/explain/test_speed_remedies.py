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
