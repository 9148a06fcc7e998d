"""The host memory that prepared images take, and the bytes of a GPU that a slice allows."""

from __future__ import annotations

import pytest

from tests.support.pods import pod
from turbofit.api import plan, predict
from turbofit.core.machine import Machine
from turbofit.core.plan import Plan
from turbofit.core.units import GIB
from turbofit.machine.visible import held_to_slices
from turbofit.planning.plan import plan as plan_of
from turbofit.planning.request import PlanRequest

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


LIMIT = "CUDA_DEVICE_MEMORY_LIMIT"


def planned(machine: Machine, **options: object) -> Plan:
    return plan_of(PlanRequest(model="internvl2-2b", on=machine, **options))


def test_a_plan_stays_below_each_slice_and_its_ratio_is_of_the_whole_card() -> None:
    machine = held_to_slices(pod(), {f"{LIMIT}_0": "12000m", f"{LIMIT}_1": "8g"})
    plan = planned(machine, context=8192, replicas=2)
    assert plan.fits
    # Each card has settings of its own.
    ratios = [part.settings.cache_max_entry_count for part in plan.engines]
    assert ratios[0] > ratios[1]
    for ledger in plan.ledgers:
        margin = ledger.margin - ledger.beyond_budget
        assert ledger.peak + margin <= machine.gpu(ledger.index).ours < ledger.total / 2
        region = next(term.bytes for term in ledger.terms if term.term == "kv_cache")
        assert region < 0.5 * ledger.free
    whole = planned(pod(), context=8192, replicas=2)
    assert whole.engines[0].settings.cache_max_entry_count > 2 * ratios[0]
    # An option can lower a slice, and not raise it.
    assert (
        planned(machine, context=8192, replicas=2, budget=20 * GIB).ledgers[0].peak
        == plan.ledgers[0].peak
    )
    assert planned(machine, context=8192, gpus="0", budget=10 * GIB).ledgers[0].peak < 10 * GIB
