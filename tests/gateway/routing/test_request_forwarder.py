"""From a request to its place at an engine, where others end engines meanwhile."""

from __future__ import annotations

import asyncio

from tests import virtual_time
from tests.gateway.routing.test_quarantine import KILLS, Fleet, code
from tests.support.gateway import image_part
from tests.waiting import auntil


def test_who_waits_for_room_while_an_equal_one_ends_an_engine_is_a_suspect() -> None:
    """Else each copy would end one more engine, beside innocent ones."""

    async def run():
        async with Fleet(4, restart=300.0) as fleet:
            parts, engines = (image_part(1200, 900),), fleet.app.engines
            innocent = [asyncio.ensure_future(fleet.ask("innocent", parts=parts))]
            await auntil(lambda: any(engine.host_bytes for engine in engines), "it to be sent")
            room = sum(engine.host_bytes for engine in engines)
            for engine in engines:
                engine.host_limit = room  # one such request
            innocent += [
                asyncio.ensure_future(fleet.ask(f"innocent {n}", parts=parts)) for n in (1, 2)
            ]
            await auntil(lambda: sum(one.outstanding for one in engines) == 3, "them to be sent")
            killing = [asyncio.ensure_future(fleet.ask(KILLS, parts=parts)) for _ in range(4)]
            await auntil(lambda: fleet.app.admission.waiting == 3, "three to wait for room")
            replies = await asyncio.gather(*killing)
            beside = await asyncio.gather(*innocent)
            left = [(one.places, one.host_bytes, one.reserved) for one in engines]
            return replies, len(fleet.deaths), [one.status for one in beside], left

    replies, deaths, beside, left = virtual_time.run(run())
    # The first ends an engine, the second one more, alone there: that convicts the others.
    assert deaths == 2
    assert sorted(map(code, replies)) == [*[(422, "convicted")] * 2, *[(503, "engine_died")] * 2]
    assert beside == [200] * 3
    assert left == [(0, 0, False)] * 4
