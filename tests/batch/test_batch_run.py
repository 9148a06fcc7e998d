from __future__ import annotations

import asyncio
import random
import threading
from contextlib import nullcontext

import pytest

from tests.batch.standin import items_of, lines
from turbofit.batch.batch_job import in_thread, run_together, send_all
from turbofit.batch.item import BatchError, BatchItem, BatchLine
from turbofit.batch.output_file import OutputFile, Survey


class Under:
    """A run with what it needs, and what was seen of it."""

    def __init__(self, tmp_path, count: int, ask, **options) -> None:
        self.path, self.read, self.written = tmp_path / "out.jsonl", 0, 0
        self.survey = Survey(items_of(range(1, count + 1)))
        self._count, self._ask, self._options = count, ask, options
        self.most_ahead = 0

    def _count_written(self, written: int) -> None:
        self.written += written

    def _items(self):
        for item in items_of(range(1, self._count + 1)):
            self.read += 1
            self.most_ahead = max(self.most_ahead, self.read - self.written)
            yield item

    @property
    def taken(self) -> list[str]:
        """The names of the output's lines."""
        return [line["custom_id"] for line in lines(self.path)]

    def run(self) -> None:
        async def main() -> None:
            with OutputFile(self.path) as output:
                output.resume(Survey([]), retry_failed=False)
                found = self.survey.pending(self._items())
                options = {"at_once": 4, **self._options}
                await send_all(found, output, self._ask, self._count_written, **options)

        asyncio.run(main())


def answer(item: BatchItem) -> BatchLine:
    error = item.fault and BatchError(code=item.fault.code, message=item.fault.message)
    return BatchLine(id=item.line_id, custom_id=item.custom_id, error=error)


def shuffled(seed: int):
    draw = random.Random(seed)

    async def ask(item: BatchItem) -> BatchLine:
        for _ in range(draw.randrange(30)):
            await asyncio.sleep(0)
        return answer(item)

    return ask


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_every_item_has_one_line(count, tmp_path) -> None:
    under = Under(tmp_path, count, shuffled(count))
    under.run()
    assert sorted(under.taken) == sorted(f"i{n}" for n in range(1, count + 1))
    assert under.path.read_bytes().count(b"\n") == count


def test_so_many_are_under_way_and_no_more_are_read(tmp_path) -> None:
    running, most = 0, 0

    async def ask(item: BatchItem) -> BatchLine:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return answer(item)

    under = Under(tmp_path, 500, ask, at_once=7)
    under.run()
    assert most == 7
    assert under.most_ahead <= 7 + 2 * 16


def test_in_order_lines_wait_and_so_does_who_is_far_in_front(tmp_path) -> None:
    begun: list[int] = []
    first = asyncio.Event()

    async def ask(item: BatchItem) -> BatchLine:
        begun.append(item.number)
        if item.number == 1:
            await first.wait()
        elif item.number == 32:  # 8 times 4: nobody begins beyond
            asyncio.get_running_loop().call_later(0.01, first.set)
        await asyncio.sleep(0)
        if not first.is_set():
            assert max(begun) <= 32
        return answer(item)

    under = Under(tmp_path, 200, ask, in_order=True)
    under.run()
    assert under.taken == [f"i{n}" for n in range(1, 201)]


@pytest.mark.parametrize("first", ["nothing", "work", "beside"])
def test_the_end_of_the_work_and_the_first_error_end_the_rest(first) -> None:
    ended = []

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        if first == name:
            raise KeyError(name)
        ended.append(name)

    async def for_ever(name: str) -> None:
        try:
            await work(name)
            await asyncio.Event().wait()
        finally:
            ended.append("rest")

    failing = first != "nothing"
    with pytest.raises(KeyError) if failing else nullcontext():
        asyncio.run(run_together([work("a"), work("work")], [for_ever("beside")]))
    assert ended[-1] == "rest"
    assert failing or ended == ["a", "work", "beside", "rest"]


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
