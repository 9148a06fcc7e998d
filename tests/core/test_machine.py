from __future__ import annotations

from msgspec.structs import replace

from turbofit.core.machine import Link
from turbofit.core.struct import decode, to_json
from turbofit.machine.spec import parse_spec


def test_a_link_is_found_from_either_end() -> None:
    machine = parse_spec("4xrtx3090,nvlink=0-2+3-1")
    assert machine.link(2, 0) is machine.link(0, 2)
    assert machine.link(0, 2).nvlinked
    assert machine.link(0, 1) in machine.links
    assert machine.link(0, 9) == Link(a=0, b=9)


def test_what_was_looked_up_is_no_part_of_a_machine() -> None:
    machine = parse_spec("2xrtx3090")
    before, bare = to_json(machine), parse_spec("2xrtx3090")
    assert machine.link(0, 1).a == 0
    assert to_json(machine) == before
    assert machine == bare
    alone = replace(machine, links=())
    assert alone.link(0, 1) == Link(a=0, b=1)
    assert decode(before, type(machine), what="a machine").link(0, 1) == machine.link(0, 1)
