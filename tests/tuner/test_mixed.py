"""Engines on unequal cards side by side: each on equal cards, with settings of its own."""

from __future__ import annotations

import pytest

import turbofit
from turbofit.core.errors import UsageError
from turbofit.machine.spec import parse_spec
from turbofit.tuner.search.shapes import kinds, like_groups, mixed_groupings


@pytest.mark.parametrize("on", ["rtx3090+rtx4090", "2xrtx3090+2xrtx4090", "rtx3090+l4"])
def test_all_cards_serve_where_that_is_faster(on: str) -> None:
    plan = turbofit.plan("internvl2-8b", on=on)
    names = {gpu.index: gpu.name for gpu in plan.machine.gpus}
    assert sorted(i for group in plan.parallel.groups for i in group) == sorted(names)
    assert all(len({names[i] for i in group}) == 1 for group in plan.parallel.groups)
    assert plan.fits
    assert len(plan.by_group) == len(plan.parallel.groups)
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
    assert mixed_groupings(machine, kinds(machine.gpus), [[1]]) == []
    machine = parse_spec("2xrtx3090+rtx4090")
    parts = kinds(machine.gpus)
    assert mixed_groupings(machine, parts, [[2], []]) == []
    assert mixed_groupings(machine, parts, [[1], [1]]) == [((0,), (1,), (2,))]
    assert mixed_groupings(machine, parts, [[1, 2], [1]])[1] == ((0, 1), (2,))


def test_kinds_that_cannot_hold_the_model_do_not_keep_the_others_idle() -> None:
    plan = turbofit.plan("internvl2-8b", on="rtx3060+rtx3090+rtx4080+rtx4090")
    assert plan.parallel.groups == ((1,), (3,))


def test_of_three_kinds_one_may_be_left_out() -> None:
    machine = parse_spec("rtx3090+rtx4090+l4")
    ways = mixed_groupings(machine, kinds(machine.gpus), [[1], [1], [1]])
    assert ways[0] == ((0,), (1,), (2,))
    assert set(ways[1:]) == {((0,), (1,)), ((0,), (2,)), ((1,), (2,))}


def test_kinds_are_split_by_degrees_of_their_own() -> None:
    plan = turbofit.plan("internvl2-8b", on="2xrtx4080+rtx3090")
    assert plan.parallel.groups == ((0, 1), (2,))
    assert plan.parallel.tp == 2
    assert [own.settings.tp for own in plan.by_group] == [2, 1]
    words = [command.argv[command.argv.index("--tp") + 1] for command in plan.commands]
    assert words == ["2", "1"]
    assert plan.parallel.reason.startswith("1 x one GPU each and 1 x tp 2")


def test_unequal_cards_are_split_over_only_where_that_was_asked() -> None:
    on = "rtx3090+rtx4090"
    free = turbofit.plan("internvl2-8b", on=on)
    assert all(len(group) == 1 for one in free.considered for group in one.groups)
    asked = turbofit.plan("internvl2-8b", on=on, tp=2)
    assert asked.fits
    assert sorted(asked.parallel.groups[0]) == [0, 1]
    assert all(ledger.fits for ledger in asked.gpus)
    assert any("split over unequal cards, as you asked" in text for text in asked.warnings)
    twice = turbofit.plan("internvl2-8b", on="3xrtx3090+rtx4090", tp=2, replicas=2)
    assert sorted(len({twice.machine.gpu(i).name for i in g}) for g in twice.parallel.groups) == [
        1,
        2,
    ]
    equal = turbofit.plan("internvl2-8b", on="2xrtx3090+rtx4090", tp=2)
    assert equal.parallel.groups == ((0, 1),)
    with pytest.raises(UsageError, match="4-bit weights"):
        turbofit.plan("internvl2-8b-awq", on=on, tp=2)


@pytest.mark.parametrize(
    ("on", "sets"),
    [
        ("2xrtx3090", [[(0,), (1,)]]),
        ("rtx3090+rtx3090:used=40MiB", [[(0,), (1,)]]),
        ("rtx3090:used=900MiB+rtx3090+rtx3090", [[(1,), (2,)], [(0,)]]),
        ("rtx3090+rtx4090", [[(0,)], [(1,)]]),
    ],
)
def test_groups_are_alike_by_their_cards_and_what_they_have_free(on: str, sets) -> None:
    machine = parse_spec(on)
    found = like_groups(machine, [(gpu.index,) for gpu in machine.gpus])
    assert [list(members) for members in found] == sets
