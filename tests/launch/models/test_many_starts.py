"""Several models sleep, share a card and take turns, start after start, and lose no request.

A thousand starts of each history are in bench/several.
"""

from __future__ import annotations

import pytest

pytest.importorskip("aiohttp")

from bench.simulation.several import History, Kind

pytestmark = pytest.mark.slow

THREE = ("internvl2-2b", "qwen2-vl-2b", "internvl2-1b")
TURNS = ("internvl2-8b", "qwen2-vl-7b", "internvl2-2b")
KINDS = {
    "in turns": Kind(TURNS, "1xrtx3090", {"swap": True}, pause=15.0),
    "in turns, two at once": Kind(
        THREE, "1xrtx3090", {"swap": True}, {"budget": "11GiB"}, at_once=2, pause=15.0
    ),
    "asleep": Kind(TURNS[:1], "1xrtx3090", {"idle": "1m"}, pause=90.0),
    "together, asleep, engines die": Kind(
        THREE, "1xrtx3090", {"idle": "5m"}, at_once=3, pause=120.0, faults=6.0
    ),
    "in turns, engines die": Kind(TURNS[:2], "1xrtx3090", {"swap": True}, pause=15.0, faults=6.0),
}
STARTS = 20


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_lost_in_twenty_starts(name: str) -> None:
    history = History(0, KINDS[name], STARTS)
    assert history.run() == []
    assert history.world.counts["engine starts"] >= STARTS
    assert sum(request.end == "200" for request in history.world.requests) >= STARTS
