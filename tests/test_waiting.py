"""What other tests wait with."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis.internal.conjecture import providers

from tests import virtual_time
from tests.support.waiting import HANG, auntil, until


def test_what_never_comes_is_named() -> None:
    with pytest.raises(AssertionError, match="waited 0 s for the moon"):
        until(lambda: None, "the moon", 0)
    with pytest.raises(AssertionError, match=f"waited {HANG:.0f} s for the moon"):
        virtual_time.run(auntil(lambda: None, "the moon"))
    with pytest.raises(AssertionError, match="everything waits"):
        virtual_time.run(asyncio.Event().wait())


def test_examples_are_the_same_whatever_a_worker_has_loaded() -> None:
    found = providers._get_local_constants()
    assert not any(map(found.set_for_type, ("integer", "float", "bytes", "string")))


def test_virtual_time_goes_on_where_nothing_else_does() -> None:
    async def later(order: list[str], name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append(name)

    async def main() -> tuple[list[str], float]:
        began, order = time.monotonic(), []
        late = asyncio.ensure_future(later(order, "late", 3600))
        early = asyncio.ensure_future(later(order, "early", 1800))
        await asyncio.to_thread(order.append, "thread")
        assert time.monotonic() == time.perf_counter() == began
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(asyncio.Event().wait(), 2000)
        await asyncio.gather(late, early)
        return order, time.monotonic() - began

    before = time.monotonic
    order, spent = virtual_time.run(main())
    assert (order, time.monotonic) == (["thread", "early", "late"], before)
    assert spent == pytest.approx(3600)


def test_a_thread_is_waited_for_before_the_clock_moves() -> None:
    async def main() -> bool:
        asked = threading.Event()
        thread = asyncio.get_running_loop().run_in_executor(None, asked.wait)
        asyncio.get_running_loop().call_soon(asked.set)
        await asyncio.wait_for(thread, 1e-6)
        return thread.result()

    assert virtual_time.run(main())


def test_a_loop_of_a_thread_that_ran_before_keeps_the_real_time() -> None:
    ended, ticked = threading.Event(), threading.Event()

    async def tick() -> None:
        while not ended.is_set():
            await asyncio.sleep(0.001)
            ticked.set()

    async def main() -> bool:
        await asyncio.sleep(3600)
        ticked.clear()
        return ticked.wait(HANG)

    thread = threading.Thread(target=lambda: asyncio.run(tick()), daemon=True)
    thread.start()
    assert ticked.wait(HANG)
    assert virtual_time.run(main())
    ended.set()
    thread.join(HANG)
    assert not thread.is_alive()
