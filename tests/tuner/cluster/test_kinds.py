"""Nodes are folded where they are alike, and planned for the fullest of them."""

from __future__ import annotations

import random

from msgspec.structs import replace

from tests.fixtures.clusters import node
from turbofit.core.machine import Calibration, CardSpeed, Measured
from turbofit.core.struct import known
from turbofit.core.units import GIB, MIB
from turbofit.tuner.cluster.cluster_plan import kinds_of


def used_of(machine: object) -> list[int]:
    return [known(gpu.used, 0) for gpu in machine.gpus]  # type: ignore[attr-defined]


def test_like_nodes_are_one_kind_planned_for_the_fullest_card_by_card() -> None:
    nodes = [
        node(1, "2xrtx3090", [3 * MIB, 10 * MIB]),
        node(2, "2xrtx3090", [9 * MIB, 2 * MIB]),
        node(3, "2xrtx4090"),
    ]
    kinds = kinds_of(nodes)
    assert [[one.id for one in kind.nodes] for kind in kinds] == [["0001", "0002"], ["0003"]]
    assert used_of(kinds[0].machine) == [9 * MIB, 10 * MIB]
    for gpu in kinds[0].machine.gpus:
        assert known(gpu.free, 0) == known(gpu.total, 0) - known(gpu.reserved, 0) - gpu.used


def test_a_node_alone_is_planned_for_itself() -> None:
    one = node(1, "4xrtx3090", [1, 200 * MIB, 5 * GIB, 0])
    (kind,) = kinds_of([one])
    assert kind.machine == one.machine


def test_a_step_further_is_another_kind() -> None:
    nodes = [node(1, "1xl4", [64 * MIB]), node(2, "1xl4", [64 * MIB + 1]), node(3, "1xl4", [1])]
    assert [[one.id for one in kind.nodes] for kind in kinds_of(nodes)] == [
        ["0001", "0003"], ["0002"],
    ]  # fmt: skip


def test_links_calibrations_and_measured_speeds_tell_nodes_apart() -> None:
    first = node(1, "2xrtx3090")
    machine = first.machine
    assert machine is not None
    learned = Calibration(
        model="m", engine="turbomind", engine_version="0.18", lmdeploy="0.18.0", gpus=("a", "a"),
        driver="1", communicator="nccl", when="today", context=1, buffers=2,
    )  # fmt: skip
    again = replace(learned, when="tomorrow")
    speed = Measured(torch="2", cards=(CardSpeed(index=0, bandwidth=8e11, flops=6e13),))
    slow = Measured(torch="2", cards=(CardSpeed(index=0, bandwidth=4e11, flops=6e13),))
    machines = [
        machine,
        replace(machine, calibrations=(learned,)),
        replace(machine, calibrations=(again,)),
        replace(machine, measured=speed),
        replace(machine, measured=speed, name="another", warnings=("hot",)),
        replace(machine, measured=slow),
    ]
    nodes = [replace(first, id=str(k), machine=one) for k, one in enumerate(machines)]
    nodes.append(node(7, "2xrtx3090,nvlink=0-1"))
    found = [[one.id for one in kind.nodes] for kind in kinds_of(nodes)]
    assert found == [["0"], ["1", "2"], ["3", "4"], ["5"], ["0007"]]


def test_host_memory_is_that_of_the_least() -> None:
    nodes = [node(1, "1xl4,ram=60GiB"), node(2, "1xl4,ram=57GiB"), node(3, "1xl4,ram=20GiB")]
    kinds = kinds_of(nodes)
    assert [len(kind.nodes) for kind in kinds] == [2, 1]
    assert kinds[0].machine.host.ram_available == 57 * GIB


def test_no_node_is_planned_for_more_than_it_has() -> None:
    chance = random.Random(7)
    nodes = [
        node(k, "2xrtx3090", [chance.randrange(200 * MIB) for _ in range(2)]) for k in range(200)
    ]
    kinds = kinds_of(nodes)
    assert len(kinds) <= 16
    assert sum(len(kind.nodes) for kind in kinds) == 200
    for kind in kinds:
        for one in kind.nodes:
            assert one.machine is not None
            pairs = zip(used_of(kind.machine), used_of(one.machine), strict=True)
            assert all(planned >= held for planned, held in pairs)
