"""The bars of requests that end engines, each in an hour of virtual time."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from itertools import product

import pytest

from tests.gateway.routing.test_deny_list import KILLS, Fleet, wall
from tests.sweep import sweep
from turbofit.gateway.routing.deny_list import CLIENT_DEATHS

__all__ = ["wall"]

pytestmark = pytest.mark.slow
_HOUR = 3600.0


@pytest.mark.parametrize(
    ("asks", "engines", "kind"),
    sweep(product(("often", "seldom"), (1, 8), ("new", "same")), 8),
)
async def test_a_client_that_kills_and_others_that_do_not(
    engines: int, kind: str, asks: str
) -> None:
    """It kills with one request, or with a new variation each time, in a tight loop.

    Others ask as the SDKs do, three times at most: 200 of them seldom, or three without a pause.
    None is ever refused; and one that keeps asking is answered within five minutes.
    """
    answers: Counter[str] = Counter()
    keys = [f"good {number}" for number in range(200 if asks == "seldom" else 3)]

    async def good(fleet: Fleet, key: str, ends: float, rng: random.Random) -> None:
        number = 0
        while time.monotonic() < ends:
            await asyncio.sleep(rng.random() * (240 if asks == "seldom" else 4.0))
            number, stream = number + 1, rng.random() < 0.5
            for _ in range(3):
                reply = await fleet.ask(f"{key} {number}", key, stream=stream)
                if reply.status not in (429, 503):
                    break
                answers[reply.json["error"]["code"]] += 1
                await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
            answers["good"] += reply.status == 200 and b'"error"' not in reply.body
            answers["sent"] += 1
            answers["refused"] += reply.status == 422

    async def keeps_asking(fleet: Fleet, ends: float) -> None:
        number = 0
        while time.monotonic() < ends:
            began, number = time.monotonic(), number + 1
            while (reply := await fleet.ask(f"patient {number}", "patient")).status != 200:
                assert reply.status in (429, 503)
                await asyncio.sleep(1.0)
            answers["longest"] = max(answers["longest"], round(time.monotonic() - began))

    async def bad(fleet: Fleet, ends: float) -> None:
        number = 0
        while time.monotonic() < ends:
            number += kind == "new"
            reply = await fleet.ask(f"{KILLS} {number}.", "bad")
            answers[f"bad {reply.status}"] += 1
            await asyncio.sleep(1.0)

    async with Fleet(engines, api_keys=("bad", "patient", *keys)) as fleet:
        ends = time.monotonic() + _HOUR
        for engine in fleet.app.engines:  # as whoever started them says
            engine.start_seconds = fleet.restart
        everybody = [good(fleet, key, ends, random.Random(key)) for key in keys]
        await asyncio.gather(*everybody, bad(fleet, ends), keeps_asking(fleet, ends))
        deaths = len(fleet.deaths)
    assert deaths <= (3 if kind == "same" else CLIENT_DEATHS)
    assert answers["sent"] > 3000
    assert answers["good"] >= (0.97 if engines == 1 else 0.99) * answers["sent"]
    assert answers["refused"] == answers["too_many_deaths"] == 0
    assert answers["longest"] <= 300
    assert answers["bad 422" if kind == "same" else "bad 429"] > 1000
