"""The bar of poison requests, in an hour of virtual time."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest

from tests import virtual_time
from tests.gateway.routing.test_quarantine import KILLS, Fleet, wall  # noqa: F401 - a fixture
from turbofit.gateway.quarantine.accounts import BUDGET

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engines", [3, 1])
def test_two_clients_that_kill_and_two_hundred_that_do_not(engines: int) -> None:
    """One client kills with one request in a tight loop, one with a new variation each time.

    An hour of virtual time: 200 good clients get at least 99 % of their answers, no fingerprint
    ends more than two engines, and variations end no more than the budget and those under way.
    """
    answers: Counter[str] = Counter()
    hour, keys = 3600.0, [f"good {number}" for number in range(200)]

    async def good(fleet: Fleet, key: str, ends: float, rng: random.Random) -> None:
        number = 0
        while time.monotonic() < ends:
            await asyncio.sleep(rng.random() * 240)
            number, stream = number + 1, rng.random() < 0.5
            for _ in range(3):  # as the SDKs do
                reply = await fleet.ask(f"{key} {number}", key, stream=stream)
                if reply.status not in (429, 503):
                    break
                await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
            answers["good"] += reply.status == 200 and b'"error"' not in reply.body
            answers["sent"] += 1

    async def bad(fleet: Fleet, key: str, ends: float) -> None:
        number = 0
        while time.monotonic() < ends:
            number += key == "new"
            reply = await fleet.ask(f"{KILLS} {key} {number}.", key)
            answers[f"{key} {reply.status}"] += 1
            await asyncio.sleep(1.0)

    async def run():
        async with Fleet(engines, api_keys=("same", "new", *keys)) as fleet:
            ends = time.monotonic() + hour
            for engine in fleet.app.engines:  # as whoever started them says
                engine.start_seconds = fleet.restart
            everybody = [good(fleet, key, ends, random.Random(key)) for key in keys]
            await asyncio.gather(*everybody, bad(fleet, "same", ends), bad(fleet, "new", ends))
            return fleet.deaths

    deaths = virtual_time.run(run())
    by_request = Counter(why.partition(KILLS)[2].partition(".")[0] for why in deaths)
    assert answers["sent"] > 4000
    assert answers["good"] >= 0.99 * answers["sent"]
    assert max(by_request.values()) <= 2
    assert 2 <= sum(n for why, n in by_request.items() if "new" in why) <= BUDGET + 1
    assert answers["same 422"] > 1000
    assert answers["new 429"] > 1000
