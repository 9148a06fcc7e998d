"""Links of a machine, and who holds its memory."""

from __future__ import annotations

from msgspec.structs import replace

from tests.support.plans import machine
from turbofit.core.machine import Holder, Link
from turbofit.core.struct import NA


def test_links_are_found_in_both_directions_and_unread_ones_join_nothing() -> None:
    linked = replace(machine(3), links=(Link(a=0, b=1, nvlinks=4), Link(a=0, b=2, nvlinks=0)))
    assert linked.link(1, 0) == linked.links[0]
    assert linked.link(2, 1) == Link(a=1, b=2)
    assert [
        linked.nvlinked([linked.gpu(i) for i in pair]) for pair in ((0, 1), (0, 2), (1, 2))
    ] == [True, False, False]


def test_a_holder_is_named_with_its_process_before_what_is_said_of_it() -> None:
    labels = [
        Holder(pid=pid, name=name, bytes=1).label
        for pid, name in (
            (7, "python"),
            (NA, "a container"),
            (7, "a run (turbofit stop M ends it)"),
        )
    ]
    assert labels == ["python[7]", "a container", "a run[7] (turbofit stop M ends it)"]
