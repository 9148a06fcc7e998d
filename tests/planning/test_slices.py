"""Plans inside slices of HAMi and Volcano."""

from __future__ import annotations

from tests.support.pods import pod
from turbofit.core.machine import Machine
from turbofit.core.plan import Plan
from turbofit.core.units import GIB
from turbofit.machine.visible import held_to_slices
from turbofit.planning.plan import plan as plan_of
from turbofit.planning.request import PlanRequest

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
