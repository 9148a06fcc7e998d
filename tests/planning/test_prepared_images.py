"""Prepared images in a plan's host memory: what is kept, for how many threads, and who pays."""

from __future__ import annotations

import pytest

from turbofit.api import plan, predict
from turbofit.core.units import GIB

ONE = "1xrtx3090"


def host(model="internvl2-2b", on=ONE, **options):
    return plan(model, on=on, context=8192, **options).host


def test_kept_images_are_counted_and_leave_as_much_as_they_may():
    none = host(image_cache=0)
    kept = host(image_cache="3GiB")
    assert (none.image_cache, kept.image_cache) == (0, 3 * GIB)
    assert kept.pageable == none.pageable + 3 * GIB
    assert host().image_cache == GIB  # nobody knows the host
    large, small = host(on=f"{ONE},ram=256GiB"), host(on=f"{ONE},ram=20GiB")
    assert large.image_cache == 4 * GIB
    left = small.available - small.pinned - (small.pageable - small.image_cache)
    assert small.image_cache == left // 8 < 4 * GIB
    assert 0 < host(on="2xrtx3090,ram=20GiB", replicas=2).image_cache < small.image_cache


@pytest.mark.parametrize(
    ("model", "options"),
    [("internvl2-2b", {"image_threads": 1}), ("qwen2.5-7b", {}),
     ("smolvlm-2.2b", {"engine": "transformers"})],
)  # fmt: skip
def test_nothing_is_kept_where_nothing_is_prepared_here(model, options):
    assert host(model, **options).image_cache == 0


def test_what_nobody_asked_for_makes_no_plan_too_large():
    need = host(image_cache=0)
    tight = (need.pinned + need.pageable) // GIB + 1
    machine = f"{ONE},ram={tight}GiB"
    assert plan("internvl2-2b", on=machine, context=8192).fits
    asked = plan("internvl2-2b", on=machine, context=8192, image_cache="4GiB")
    assert not asked.fits
    assert "host RAM" in asked.verdict


def test_a_prediction_is_of_lmdeploy_by_itself():
    alone = predict("internvl2-2b", on=ONE).host
    assert (alone.image_threads, alone.image_cache) == (1, 0)
    more = predict("internvl2-2b", on=ONE, image_threads=4, image_cache=GIB).host
    assert more.pageable == alone.pageable + GIB
