"""Ways to group equal GPUs."""

from __future__ import annotations

from turbofit.machine.spec import parse_spec
from turbofit.planning.search.shapes import ways


def test_equal_gpus_have_one_way() -> None:
    for count in (4, 64):
        machine = parse_spec(f"{count}xrtx3090,p2p=none")
        for replicas in range(1, count + 1):
            (groups,) = ways(machine, machine.gpus, 1, replicas)
            assert groups == tuple((index,) for index in range(replicas))
