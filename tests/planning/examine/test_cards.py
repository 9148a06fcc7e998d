"""Checks of the cards: who uses them, whether they are in order."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.support.checkup import Find, Make, two
from tests.support.nvml import LOST, P2P_NVLINK, Process, Scenario, gpu_3090, gpu_h100
from tests.support.plans import changed as with_ledgers
from tests.support.plans import gpu, machine, plausible_plan
from tests.support.pods import pod
from turbofit.core.errors import DoesNotFitError, MachineError, UsageError
from turbofit.core.machine import Holder, Machine
from turbofit.core.plan import Plan
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB
from turbofit.machine.spec import parse_spec
from turbofit.machine.visible import held_to_slices
from turbofit.planning.checks import CHECKS, refuse
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.plan import plan as plan_of
from turbofit.planning.request import PlanRequest


@pytest.mark.parametrize(
    ("check", "state", "scenario", "visible", "words"),
    [
        ("cuda_visible_devices", "warning", two(), "1", "GPU 0"),
        ("cuda_visible_devices", "warning", Scenario([gpu_3090(0)]), "0,7", "'7' is not a GPU"),
        ("gpus", "stops", Scenario([gpu_h100(0), gpu_h100(1, error=LOST)], p2p=P2P_NVLINK),
         "", "GPU 1"),
        ("free_memory", "stops", two(used=80 * 1024 * MIB - GIB), "", ""),
        ("free_memory", "warning", two(used=3 * GIB), "",
         "GPU 1: unknown (another container?) 3.0 GiB"),
        ("free_memory", "unreadable", Scenario([gpu_h100(0, total=None)]), "", ""),
    ],
)  # fmt: skip
def test_machines(
    find: Find, sources: Make, check: str, state: str, scenario: Scenario, visible: str, words: str
) -> None:
    places = sources(CUDA_VISIBLE_DEVICES=visible) if visible else sources()
    found = find(check, scenario, places)
    assert (found.state, words in found.seen + found.fix) == (state, True)


def test_others_on_the_card(find: Find, sources: Make) -> None:
    scenario = two(used=3 * GIB)
    scenario.gpus[0].compute = [Process(4711, 2 * GIB, "python3")]
    found = find("free_memory", scenario, sources())
    assert found.state == "warning"
    assert "GPU 0: python3[4711] 2.0 GiB" in found.seen
    assert "GPU 1: unknown (another container?) 3.0 GiB" in found.seen
    scenario.gpus[1].total = None
    assert find("free_memory", scenario, sources()).state == "unreadable"


def test_peers_of_consumer_cards(find: Find, sources: Make) -> None:
    scenario = Scenario([gpu_3090(index) for index in range(4)])
    scenario.pairs[0, 2] = P2P_NVLINK
    for one, other in ((0, 2), (2, 0)):
        scenario.gpus[one].links = [scenario.gpus[other].bus] * 4
    found = find("peer_access", scenario, sources())
    assert found.state == "warning"
    assert "0-1" in found.seen
    assert "0-2" not in found.seen
    assert "NVLink joins 0-2" in found.fix
    scenario.p2p, scenario.pairs = None, {}
    for other, state in ((scenario, "unreadable"), (Scenario([gpu_3090(0)]), "ok")):
        assert find("peer_access", other, sources()).state == state


def changed(index: int, **changes: object) -> Machine:
    """Four cards as a plan has them, but one."""
    now = machine(4)
    return replace(now, gpus=tuple(gpu(i, **changes) if i == index else gpu(i) for i in range(4)))


def test_order_and_more_free_memory_do_not_matter() -> None:
    plan, now = plausible_plan(), changed(2, free=24000 * MIB)
    check_machine(plan, replace(now, gpus=now.gpus[::-1]))
    with pytest.raises(MachineError, match="GPU 3 of the plan"):
        check_machine(plan, machine(3))
    with pytest.raises(MachineError, match="cannot be read"):
        check_machine(plan, changed(0, free=NA))
    with pytest.raises(UsageError, match="preset"):
        check_machine(plausible_plan(machine=machine(4, source="preset")), machine(4))


def check_machine(plan: Plan, now: Machine) -> None:
    refuse(Scene(Sources(), "lease", machine=now, plan=plan))


def test_another_process_is_named_by_what_it_took_since() -> None:
    holder = Holder(pid=4711, name="python", bytes=3174 * MIB)
    now = changed(2, free=gpu(2).free - 3174 * MIB, holders=(holder,))
    with pytest.raises(DoesNotFitError) as caught:
        check_machine(plausible_plan(), now)
    assert "python[4711] took 3.1 GiB on GPU 2" in caught.value.message
    assert caught.value.exit_code == 3
    before, grown = (Holder(pid=7, name="old", bytes=size * MIB) for size in (250, 5250))
    plan = plausible_plan(machine=changed(0, holders=(before,)))
    with pytest.raises(DoesNotFitError, match=r"old\[7\] took 4.9 GiB on GPU 0"):
        check_machine(plan, changed(0, free=gpu(0).free - 5000 * MIB, holders=(grown,)))


def test_less_within_what_the_plan_leaves_over_its_margin_is_accepted() -> None:
    plan = plausible_plan()
    free, spare = gpu(1).free, plan.ledgers[1].headroom - plan.ledgers[1].margin
    check_machine(plan, changed(1, free=free - spare))
    with pytest.raises(DoesNotFitError):
        check_machine(plan, changed(1, free=free - spare - 1))

    # What a budget withholds is for other servers, which may have taken it meanwhile.
    def withholding(size: int) -> Plan:
        cards = [
            replace(one, headroom=9000 * MIB, margin=8900 * MIB, withheld=size)
            for one in plan.ledgers
        ]
        return with_ledgers(plan, ledgers=tuple(cards))

    check_machine(withholding(8600 * MIB), changed(1, free=free - 8000 * MIB))
    for size, taken in ((0, 8000), (8600 * MIB, 8900)):
        with pytest.raises(DoesNotFitError):
            check_machine(withholding(size), changed(1, free=free - taken * MIB))


def test_a_slice_is_said_and_a_launch_stops_in_a_smaller_one() -> None:
    def seen(machine: Machine, name: str, plan: Plan | None = None) -> str | None:
        scene = Scene(Sources(), "install", machine=machine, plan=plan)
        answer = next(check for check in CHECKS if check.name == name).answer(scene)
        return None if answer is None else f"{answer.state}: {answer.seen}"

    slices = [held_to_slices(pod(), {"CUDA_DEVICE_MEMORY_LIMIT": size}) for size in ("12g", "8g")]
    assert seen(pod(), "slices") is None
    assert "GPU 1 is a slice of 12.0 GiB" in str(seen(slices[0], "slices"))
    assert "GPU 0 are MIG instances" in str(seen(parse_spec("a100-80g:mig=3g.40gb"), "slices"))
    plan = plan_of(PlanRequest(model="internvl2-2b", on=slices[0], gpus="0"))
    assert seen(slices[0], "same_machine", plan) == "ok: as the plan counted on"
    assert "GPU 0 is a slice of 8.0 GiB here" in str(seen(slices[1], "same_machine", plan))
