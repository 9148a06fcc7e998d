"""The queue of all clients: who has a place in it where it is full."""

from __future__ import annotations

import asyncio

from tests.virtual_time import settled
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import Cost
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.engines import Fleet, RoutedEngine, Turn


class Queue:
    """The door of an engine that is full."""

    def __init__(self, longest: int) -> None:
        self.engine = RoutedEngine(0, "http://e0", host_limit=1)
        self.door = Admission(Fleet([self.engine]), longest=longest)
        self.engine.host_bytes = 1  # of another one

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


async def test_one_client_may_fill_the_queue_and_makes_room_for_the_others() -> None:
    """Its newest requests go, and only until each client has as many places as the others."""
    queue = Queue(8)
    many = [await queue.ask("many") for _ in range(9)]
    alone = [refused(one) for one in many]
    few = [await queue.ask("few") for _ in range(5)]
    third = await queue.ask("third")
    mine = [refused(one) for one in (*many, *few)]
    last, waiting = refused(third), queue.door.waiting
    for one in (*many, *few, third):
        one.cancel()
    await settled()
    assert alone == [False] * 8 + [True]
    # Four places each; the third client's comes from one of the two.
    assert mine == [*[False] * 3, *[True] * 6, *[False] * 4, True]
    assert (last, waiting, queue.door.waiting, queue.door._queue.lines) == (False, 8, 0, {})


async def test_whoever_gets_in_gives_its_place_in_the_queue_back() -> None:
    queue = Queue(2)
    tasks = [await queue.ask("many"), await queue.ask("many")]
    queue.engine.host_bytes = 0
    queue.door.pump()
    await settled()
    assert tasks[0].result().engine is queue.engine
    assert (refused(await queue.ask("many")), queue.door.waiting) == (False, 2)


async def test_a_suspect_that_must_wait_holds_nobody_up_and_has_one_turn_on_all_engines() -> None:
    engines = [RoutedEngine(n, f"http://e{n}", host_limit=1) for n in range(3)]
    door = Admission(Fleet(engines))
    turns = [Turn(name, alone=False, longer=False) for name in ("a", "a", "b")]
    tasks = [asyncio.ensure_future(door.admit("one", Cost(), None, turn)) for turn in turns]
    await settled()
    there = [task.done() for task in tasks]
    other = (await door.admit("other", Cost(host_bytes=1))).engine
    tasks[0].result().end_turn()
    await settled()
    assert (there, other.index, tasks[1].done(), door.waiting) == ([True, False, True], 0, True, 0)


async def test_an_engine_gets_nothing_new_while_a_suspect_is_alone_there() -> None:
    engine = RoutedEngine(0, "http://e")
    door, turn = Admission(Fleet([engine])), Turn("a", alone=True, longer=False)
    place = await door.admit("one", Cost(), None, turn)
    other = asyncio.ensure_future(door.admit("other", Cost()))
    await settled()
    waits = not other.done()
    place.end_turn()
    assert (waits, (await other).engine) == (True, engine)
