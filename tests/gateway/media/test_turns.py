"""Turns of pictures that are resized beside each other."""

from __future__ import annotations

import asyncio

import pytest

from turbofit.gateway.media.pictures import LARGEST_PIXELS
from turbofit.gateway.media.turns import PictureTurns

SMALL, PHOTO, LARGEST = (1000, 1000), (4000, 3000), (LARGEST_PIXELS // 9000, 9000)


class Resizing:
    """A picture that is being resized until `end`."""

    def __init__(self, turns: PictureTurns, size: tuple[int, int]) -> None:
        self.begun, self._end = asyncio.Event(), asyncio.Event()
        self.task = asyncio.ensure_future(self._run(turns, size))

    async def _run(self, turns: PictureTurns, size: tuple[int, int]) -> None:
        async with turns.of(size):
            self.begun.set()
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


async def settle() -> None:
    """Until all that can go on has done so."""
    for _ in range(100):
        await asyncio.sleep(0)


async def started(turns: PictureTurns, sizes) -> list[Resizing]:
    pictures = [Resizing(turns, size) for size in sizes]
    await settle()
    return pictures


async def finish(pictures: list[Resizing]) -> None:
    for picture in pictures:
        await picture.end()


@pytest.mark.parametrize(
    ("threads", "size", "at_once"),
    [(0, SMALL, 2), (1, PHOTO, 2), (15, SMALL, 15), (15, PHOTO, 7), (15, LARGEST, 1)],
)
async def test_as_many_at_once_as_threads_and_memory_allow(threads, size, at_once) -> None:
    pictures = await started(PictureTurns(threads), [size] * 20)
    assert [picture.begun.is_set() for picture in pictures] == [True] * at_once + [False] * (
        20 - at_once
    )
    await pictures[0].end()
    await settle()
    assert sum(picture.begun.is_set() for picture in pictures) == at_once + 1
    await finish(pictures)


async def test_a_large_picture_is_not_overtaken_by_small_ones() -> None:
    turns = PictureTurns(15)
    first, large, second = await started(turns, [SMALL, (LARGEST[0] * 2, LARGEST[1]), SMALL])
    assert (first.begun.is_set(), large.begun.is_set(), second.begun.is_set()) == (
        True,
        False,
        False,
    )
    await first.end()
    await settle()
    assert (large.begun.is_set(), second.begun.is_set()) == (True, False)
    await finish([large, second])


async def test_whoever_leaves_while_it_waits_gives_its_part_back() -> None:
    turns = PictureTurns(15)
    first, large = await started(turns, [SMALL, (LARGEST[0] * 2, LARGEST[1])])
    large.task.cancel()
    await settle()
    pictures = await started(turns, [SMALL] * 15)
    assert [picture.begun.is_set() for picture in pictures] == [True] * 14 + [False]
    await finish([first, *pictures])
