"""What a vision tower computes, how often, and what of it decides on settings."""

from __future__ import annotations

import pytest

from turbofit import plan
from turbofit.core.plan import Plan
from turbofit.memory.engines import engine_of
from turbofit.planning.speed import GroupRates, group_rates
from turbofit.planning.throughput import HostRate, image_seconds, with_host
from turbofit.planning.tower import BEFORE, Tower, whole_image_prefill


def rates_of(found: Plan) -> GroupRates:
    gpus = [found.machine.gpu(index) for index in found.groups[0]]
    return group_rates(
        found.model, found.engines[0].settings, found.machine, gpus, engine_of(found)
    )


@pytest.mark.parametrize(
    ("model", "growth"),
    [
        ("qwen2-vl-2b", 4),  # all patches of an image see each other
        ("qwen2.5-vl-7b", 4),  # in one of eight layers
        ("internvl2-8b", 2),  # tiles do not
    ],
)
def test_attention_of_a_larger_image(model: str, growth: float) -> None:
    tower = rates_of(plan(model, on="1xh100")).work.tower
    units = 12 if growth == 2 else 40_000
    twice = tower.attention_flops(2 * units) / tower.attention_flops(units)
    assert twice == pytest.approx(growth, rel=0.02)


@pytest.mark.parametrize(
    ("tokens", "images", "forward", "times"),
    [
        (16384, 1, 8192, 3),  # as an H100's and an H200's log had it
        (32400, 1, 8192, 4),  # 129,600 patches, there
        (18225, 1, 8192, 3),
        (16384, 1, whole_image_prefill(16384), 1),
        (3328, 1, 4096, 1),
        (10752, 1, 4096, 3),
        (6656, 2, 4096, 3),
    ],
)
def test_an_image_is_encoded_for_each_forward_that_holds_some_of_it(
    tokens: int, images: int, forward: int, times: int
) -> None:
    assert Tower(encodes_again=True).encodings(BEFORE, tokens, forward, images) == times
    assert Tower().encodings(BEFORE, tokens, forward, images) == images


def test_the_largest_image_is_encoded_once_where_memory_allows() -> None:
    """Of Qwen2-VL-2B on an H100: three times with the prefill of before."""
    found = plan("qwen2-vl-2b", on="1xh100")
    assert found.engines[0].settings.max_prefill_token_num == whole_image_prefill(16384) == 16448
    assert not any("encoded" in reason for reason in found.reasons)
    asked = plan("qwen2-vl-2b", on="1xh100", max_prefill_token_num=8192)
    (reason,) = (text for text in asked.reasons if text.startswith("max_prefill_token_num"))
    assert "as set by you" in reason
    small = plan("qwen3.5-9b", on="1xrtx3090")  # its states leave no room
    if small.engines[0].settings.max_prefill_token_num == 8192:
        assert any("the largest image is encoded 3 times" in text for text in small.reasons)


def test_attention_decides_on_no_batch_and_no_cache() -> None:
    """A worst image that takes a card seconds lets texts and small images wait for nothing."""
    found = plan("qwen2-vl-7b", on="1xrtx3090")
    assert (found.engines[0].settings.max_batch_size, found.engines[0].kv.tokens) == (21, 67_968)


def test_plain_lmdeploy_prepares_tiles_its_by_float() -> None:
    """One thread and no table: 7.6 requests/s of 1920x1080 on an H100 with 16 cores."""
    rule, size = plan("internvl2-2b", on="1xh100,cores=16").model.image_rule, (1920, 1080)
    assert rule is not None
    own = image_seconds(rule, rule.units(*size), size, by_float=True)
    assert 1 / own == pytest.approx(7.6, rel=0.15)
    assert own > image_seconds(rule, rule.units(*size), size)


def test_a_lone_request_waits_for_the_host_and_many_do_not() -> None:
    slow, fast = (HostRate(cores=cores, seconds=0.5) for cores in (5, 50))
    assert (with_host(2.0, 1.0, slow, 1)[0], with_host(2.0, 8.0, slow, 1)[0]) == (1.0, 2.0)
    assert with_host(20.0, 8.0, slow, 1)[0] == 10.0 < with_host(20.0, 8.0, fast, 1)[0]
