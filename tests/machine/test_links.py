from __future__ import annotations

from turbofit.core.struct import NA
from turbofit.machine.links import LaneMap, preset_links, shared_lanes
from turbofit.machine.presets import load_preset


def lanes(*ends: str | None, readable: bool = True) -> LaneMap:
    found = LaneMap()
    found.readable = readable
    for end in ends:
        found.add(end)
    return found


def test_direct_lanes_are_counted_by_bus():
    first = lanes("B", "B", "C", None)
    assert shared_lanes(first, lanes(), "B", over_switch=False) == 2
    assert shared_lanes(first, lanes(), "C", over_switch=True) == 1
    assert shared_lanes(first, lanes(), "D", over_switch=False) == 0


def test_switch_lanes_count_only_where_nvml_says_nvlink():
    first, second = lanes(*[None] * 12), lanes(*[None] * 11)
    assert shared_lanes(first, second, "B", over_switch=True) == 11
    assert shared_lanes(first, second, "B", over_switch=False) == 0
    assert shared_lanes(first, second, "B", over_switch=NA) == NA
    assert shared_lanes(lanes(), lanes(), "B", over_switch=NA) == 0


def test_unreadable_lanes_are_unknown():
    assert shared_lanes(lanes(readable=False), lanes("A"), "B", over_switch=True) == NA


def test_explicit_peer_access_wins_over_the_cards_default():
    pair = [load_preset("rtx4090"), load_preset("rtx3090")]
    assert preset_links(pair, p2p="all")[0].peers
    assert not preset_links(pair)[0].peers
    h100 = [load_preset("h100")] * 2
    link = preset_links(h100, p2p="none")[0]
    assert link.nvlinked
    assert not link.peers


def test_unequal_cards_get_the_lesser_nvlink():
    pair = [load_preset("a100-40g"), load_preset("h100")]
    assert not preset_links(pair)[0].nvlinked
    link = preset_links(pair, nvlink=frozenset({(0, 1)}))[0]
    assert (link.nvlinks, link.nvlink_bandwidth) == (12, 12 * 25 * 10**9)
