from __future__ import annotations

import asyncio
import threading

import pytest

from turbofit.batch.together import in_thread, run_together


def test_the_end_of_the_work_ends_the_rest() -> None:
    ended = []

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        ended.append(name)

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("beside")

    asyncio.run(run_together([work("a"), work("b")], [for_ever()]))
    assert ended == ["a", "b", "beside"]


@pytest.mark.parametrize("first", ["work", "beside"])
def test_the_first_error_ends_all(first) -> None:
    ended = []

    async def fails() -> None:
        raise KeyError(first)

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    both = [fails()], [for_ever()]
    with pytest.raises(KeyError):
        asyncio.run(run_together(*(both if first == "work" else reversed(both))))
    assert ended == [1]


def test_who_is_cancelled_waits_for_its_thread() -> None:
    began, goes_on, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        began.set()
        goes_on.wait()
        ended.append("thread")

    async def main() -> None:
        task = asyncio.ensure_future(in_thread(work))
        await asyncio.to_thread(began.wait)
        task.cancel()
        await asyncio.sleep(0)
        goes_on.set()
        await asyncio.wait((task,))
        ended.append("task")
        assert task.cancelled()

    asyncio.run(main())
    assert ended == ["thread", "task"]
    assert asyncio.run(in_thread(int, "7")) == 7
