from __future__ import annotations

import msgspec
import pytest

from tests.support.plans import gpu, machine, plausible_plan
from turbofit.core.errors import DoesNotFitError, MachineError, UsageError
from turbofit.core.machine import Holder, Machine
from turbofit.core.struct import NA
from turbofit.core.units import MIB
from turbofit.launch.serve.preflight import check_machine


def changed(index: int, **changes: object) -> Machine:
    cards = [gpu(i, **changes) if i == index else gpu(i) for i in range(4)]
    return msgspec.structs.replace(machine(4), gpus=tuple(cards))


def test_the_same_machine() -> None:
    check_machine(plausible_plan(), machine(4))


def test_order_and_more_free_memory_do_not_matter() -> None:
    now = changed(2, free=24000 * MIB)
    check_machine(plausible_plan(), msgspec.structs.replace(now, gpus=now.gpus[::-1]))


def test_another_process_is_named() -> None:
    holder = Holder(pid=4711, name="python", bytes=3174 * MIB)
    now = changed(2, free=gpu(2).free - 3174 * MIB, holders=(holder,))
    with pytest.raises(DoesNotFitError) as caught:
        check_machine(plausible_plan(), now)
    assert "python[4711] took 3.1 GiB on GPU 2" in caught.value.message
    assert caught.value.exit_code == 3


def test_growth_counts_not_what_was_there() -> None:
    before = Holder(pid=7, name="old", bytes=250 * MIB)
    plan = plausible_plan()
    cards = (gpu(0, holders=(before,)), *plan.machine.gpus[1:])
    plan = msgspec.structs.replace(plan, machine=msgspec.structs.replace(machine(4), gpus=cards))
    grown = msgspec.structs.replace(before, bytes=5250 * MIB)
    with pytest.raises(DoesNotFitError, match=r"old\[7\] took 4.9 GiB on GPU 0"):
        check_machine(plan, changed(0, free=gpu(0).free - 5000 * MIB, holders=(grown,)))


def test_nobody_visible() -> None:
    with pytest.raises(DoesNotFitError, match=r"nobody visible took 3\.9 GiB on GPU 1"):
        check_machine(plausible_plan(), changed(1, free=gpu(1).free - 4000 * MIB))


def test_less_within_what_the_plan_leaves_over_its_margin_is_accepted() -> None:
    plan = plausible_plan()
    spare = plan.gpus[1].headroom - plan.gpus[1].margin
    check_machine(plan, changed(1, free=gpu(1).free - spare))
    with pytest.raises(DoesNotFitError):
        check_machine(plan, changed(1, free=gpu(1).free - spare - 1))


def test_a_gpu_that_is_gone_or_cannot_be_read() -> None:
    with pytest.raises(MachineError, match="GPU 3 of the plan"):
        check_machine(plausible_plan(), machine(3))
    with pytest.raises(MachineError, match="cannot be read"):
        check_machine(plausible_plan(), changed(0, free=NA))


def test_a_preset_is_no_machine() -> None:
    preset = msgspec.structs.replace(machine(4), source="preset")
    with pytest.raises(UsageError, match="preset"):
        check_machine(plausible_plan(machine=preset), machine(4))


def test_what_a_budget_withholds_is_for_the_other_models() -> None:
    """Where each start fits its cache, they may have taken it meanwhile."""
    plan = plausible_plan()
    cards = tuple(
        msgspec.structs.replace(one, headroom=9000 * MIB, margin=8900 * MIB) for one in plan.gpus
    )
    plan = msgspec.structs.replace(plan, gpus=cards)
    now = changed(1, free=plan.gpus[1].free - 8000 * MIB)
    check_machine(plan, now, fitted=True)
    with pytest.raises(DoesNotFitError):
        check_machine(plan, now)
    with pytest.raises(DoesNotFitError):
        check_machine(plan, changed(1, free=plan.gpus[1].free - 8900 * MIB), fitted=True)
