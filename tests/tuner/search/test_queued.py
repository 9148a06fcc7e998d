"""Queueing images is chosen where it keeps or serves more, and never where somebody said no."""

from __future__ import annotations

import pytest

import turbofit
from turbofit.core.plan import Plan
from turbofit.gateway.limits.request_limits import bounds_of

TIGHT = ("internvl2-2b", "1xl4:free=8GiB")


def plan(queue: bool | None) -> Plan:
    model, on = TIGHT
    return turbofit.plan(model, on=on, queue_images=queue)


def test_where_the_cache_is_short_queueing_serves_more() -> None:
    chosen, without = plan(None), plan(False)
    assert chosen.settings.session_len == without.settings.session_len
    assert chosen.limits.units_per_image == without.limits.units_per_image
    assert chosen.throughput is not None
    assert without.throughput is not None
    assert chosen.throughput.requests_per_second > 2 * without.throughput.requests_per_second
    assert bounds_of(chosen).gate is not None
    assert bounds_of(without).gate is None
    assert any("the cache gets the rest" in reason for reason in chosen.reasons)


def test_a_queue_is_as_wide_as_costs_nothing() -> None:
    chosen, forced = plan(None), plan(True)
    assert forced.limits.units_per_forward == forced.limits.units_per_request
    assert chosen.limits.units_per_forward > forced.limits.units_per_forward
    assert chosen.settings.max_batch_size == forced.settings.max_batch_size
    assert chosen.settings.session_len == forced.settings.session_len


def test_memory_for_more_rows_wants_a_queue_too() -> None:
    """One row more would let so many images meet that the context does not fit any more."""
    found = turbofit.plan("internvl2-8b", on="1xrtx4090:free=20.57GiB")
    assert found.settings.session_len == 32_768
    assert found.settings.max_batch_size > 1
    assert bounds_of(found).gate is not None


@pytest.mark.parametrize("model", ["internvl2-8b", "qwen2-vl-7b"])
def test_where_there_is_cache_enough_nothing_queues(model: str) -> None:
    roomy = turbofit.plan(model, on="1xh100")
    assert bounds_of(roomy).gate is None
    assert roomy.workload.queue_images is None
