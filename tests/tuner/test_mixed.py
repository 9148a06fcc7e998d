"""Engines on unequal cards side by side: each on equal cards, all with the same settings."""

from __future__ import annotations

import pytest

import turbofit
from turbofit.machine.spec import parse_spec
from turbofit.tuner.groups import kinds, mixed_groupings


@pytest.mark.parametrize("on", ["rtx3090+rtx4090", "2xrtx3090+2xrtx4090", "rtx3090+l4"])
def test_all_cards_serve_where_that_is_faster(on: str) -> None:
    plan = turbofit.plan("internvl2-8b", on=on)
    names = {gpu.index: gpu.name for gpu in plan.machine.gpus}
    assert sorted(i for group in plan.parallel.groups for i in group) == sorted(names)
    assert all(len({names[i] for i in group}) == 1 for group in plan.parallel.groups)
    assert any("unequal cards run the same settings" in word for word in plan.warnings)
    assert plan.fits
    assert all(ledger.headroom >= ledger.margin for ledger in plan.gpus)
    for card in set(names.values()):
        own = ",".join(str(i) for i, name in names.items() if name == card)
        alone = turbofit.plan("internvl2-8b", on=on, gpus=own)
        rates = [one.throughput.requests_per_second for one in (plan, alone)]
        assert rates[0] > rates[1]


def test_each_engine_has_a_command_of_its_own_cards() -> None:
    plan = turbofit.plan("internvl2-8b", on="rtx3090+rtx4090")
    assert [command.env["CUDA_VISIBLE_DEVICES"] for command in plan.commands] == ["0", "1"]


def test_a_card_too_small_is_left_out_and_types_are_not_mixed() -> None:
    plan = turbofit.plan("internvl2-8b", on="rtx3090+rtx3060")
    assert plan.parallel.groups == ((0,),)
    old = turbofit.plan("internvl2-8b", on="rtx3090+v100-32g")
    assert len(old.parallel.groups) == 1  # bfloat16 and float16 are no one setting


def test_what_was_asked_is_kept() -> None:
    on = "2xrtx3090+2xrtx4090"
    for replicas in (1, 2, 4):
        plan = turbofit.plan("internvl2-8b", on=on, tp=1, replicas=replicas)
        assert len(plan.parallel.groups) == replicas
    pairs = turbofit.plan("internvl2-8b", on=on, tp=2, replicas=2)
    assert pairs.parallel.groups == ((0, 1), (2, 3))


def test_one_kind_has_nothing_to_mix() -> None:
    machine = parse_spec("4xrtx3090")
    assert mixed_groupings(machine, kinds(machine.gpus), 1) == []
    machine = parse_spec("2xrtx3090+rtx4090")
    parts = kinds(machine.gpus)
    assert mixed_groupings(machine, parts, 2) == []
    assert mixed_groupings(machine, parts, 1) == [((0,), (1,), (2,))]
