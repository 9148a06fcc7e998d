"""The queue of all clients: who has a place in it where it is full."""

from __future__ import annotations

import asyncio

from tests import virtual_time
from tests.virtual_time import settled
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.engines import RoutedEngine


class Queue:
    """The door of an engine that is full."""

    def __init__(self, longest: int) -> None:
        self.engine = RoutedEngine(0, "http://e0", host_limit=1)
        self.door = Admission([self.engine], longest=longest)
        self.door.take(self.engine, Cost(host_bytes=1))

    async def ask(self, client: str) -> asyncio.Task:
        task = asyncio.ensure_future(self.door.admit(client, Cost(host_bytes=1)))
        await settled()
        return task


def refused(task: asyncio.Task) -> bool:
    if not task.done():
        return False
    assert isinstance(error := task.exception(), Refusal)
    assert (error.status, error.reason) == (429, "busy")
    return True


def test_one_client_may_fill_the_queue_and_makes_room_for_the_others() -> None:
    """Its newest requests go, and only until each client has as many places as the others."""

    async def run():
        queue = Queue(8)
        many = [await queue.ask("many") for _ in range(9)]
        alone = [refused(one) for one in many]
        few = [await queue.ask("few") for _ in range(5)]
        third = await queue.ask("third")
        found = [refused(one) for one in (*many, *few)], refused(third), queue.door.waiting
        for one in (*many, *few, third):
            one.cancel()
        await settled()
        return alone, found, queue.door.waiting, queue.door._places

    alone, (mine, third, waiting), left, places = virtual_time.run(run())
    assert alone == [False] * 8 + [True]
    # Four places each; the third client's comes from one of the two.
    assert mine == [*[False] * 3, *[True] * 6, *[False] * 4, True]
    assert (third, waiting, left, places) == (False, 8, 0, {})


def test_whoever_gets_in_gives_its_place_in_the_queue_back() -> None:
    async def run():
        queue = Queue(2)
        tasks = [await queue.ask("many"), await queue.ask("many")]
        queue.door.release(queue.engine, Cost(host_bytes=1))
        await settled()
        assert tasks[0].result() is queue.engine
        return refused(await queue.ask("many")), queue.door.waiting

    assert virtual_time.run(run()) == (False, 2)


def test_what_is_sent_again_is_never_sent_away() -> None:
    async def run():
        queue = Queue(1)
        gone = RoutedEngine(1, "http://e1")
        door = queue.door
        again = door.admit("many", Cost(host_bytes=1), None, (gone,))
        tasks = [asyncio.ensure_future(again)]
        await settled()
        tasks.append(await queue.ask("other"))
        return [refused(one) for one in tasks]

    assert virtual_time.run(run()) == [False, True]
