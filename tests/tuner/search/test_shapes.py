"""Ways to group equal GPUs: what many cards of a machine cost."""

from __future__ import annotations

from itertools import combinations

from turbofit.core.machine import Machine
from turbofit.machine.spec import parse_spec
from turbofit.tuner.search.shapes import Groupings


def test_links_of_many_equal_gpus_are_looked_at_once(monkeypatch):
    machine, asked = parse_spec("64xrtx3090,p2p=none"), []
    link = Machine.link

    def counted(self, a, b):
        asked.append((a, b))
        return link(self, a, b)

    monkeypatch.setattr(Machine, "link", counted)
    groupings = Groupings(machine, machine.gpus)
    assert len(asked) == len(list(combinations(range(64), 2)))
    assert [len(way) for way in groupings.ways(1, 64)] == [64]
    asked.clear()
    for replicas in range(1, 65):
        (groups,) = groupings.ways(1, replicas)
        assert groups == tuple((index,) for index in range(replicas))
    assert asked == []


def test_a_link_is_found_from_both_sides_and_an_unread_one_has_no_facts():
    machine = parse_spec("4xrtx3090,nvlink=0-2")
    assert machine.link(2, 0) is machine.link(0, 2)
    assert machine.link(0, 2).nvlinked
    assert not machine.link(9, 3).peers
    assert (machine.link(9, 3).a, machine.link(9, 3).b) == (3, 9)
