"""Virtual time: threads as greenlets, one at a time, and a clock that jumps to the next event.

What happens at the same time happens in the order in which it was asked for. Nothing here reads a
clock, a random number or an address of an object, so that the same seed gives the same history.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from asyncio import events, tasks
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

#: A day has some thousands of events.
_MOST_STEPS = 1_000_000


def _swap_task(loop: Any, task: Any) -> Any:
    """Exchange the task that a loop runs; returns the old one.

    Python keeps the current task of each thread since 3.14, and of each loop before. All simulated
    threads are greenlets of one thread.
    """
    return tasks._swap_current_task(loop, task) if sys.version_info >= (3, 14) else None


class Timer:
    """An act that happens once at a time, unless ``cancel`` takes it back."""

    __slots__ = ("act",)

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def cancel(self) -> None:
        self.act = None


class Process:
    """A simulated process of turbofit: its threads, its open files, and whether it lives.

    Args:
        pid: its process id.
        skew: seconds that the wall clock was off when it started.
    """

    def __init__(self, pid: int, skew: float = 0.0) -> None:
        self.pid, self.skew = pid, skew
        self.alive = True
        self.threads: list[greenlet] = []
        self.descriptors: list[int] = []
        #: What ends with it, as the kernel ends it: engines, connections.
        self.ends: list[Callable[[], None]] = []
        #: Its newest gateway.
        self.gateway: Any = None
        #: Its supervisor's engines, how often it had something to see, and what it had seen.
        self.engines: list[Any] = []
        self.stirs = self.seen = 0
        #: What a supervisor waits for while it has nothing to see.
        self.stirred: Event | None = None


class Scheduler:
    """Virtual time, and the thread that runs now.

    Args:
        failed: called with an error that ended a thread.
        start: the time at the beginning.
    """

    def __init__(self, failed: Callable[[Exception], None], start: float = 1000.0) -> None:
        self._failed = failed
        self.now = start
        #: Seconds that the wall clock is off, by its jumps.
        self.skew = 0.0
        self.steps = 0
        self.process: Process | None = None
        self._heap: list[tuple[float, int, Timer]] = []
        self._number = itertools.count()
        self._hub = getcurrent()
        #: Threads of dead processes: the collector would run what they had yet to do.
        self._dead: list[greenlet] = []

    def at(self, when: float, act: Callable[[], None]) -> Timer:
        """Schedule an act at a time."""
        timer = Timer(act)
        heapq.heappush(self._heap, (max(when, self.now), next(self._number), timer))
        return timer

    def after(self, seconds: float, act: Callable[[], None]) -> Timer:
        """Schedule an act after some seconds."""
        return self.at(self.now + seconds, act)

    def run(self, until: float) -> None:
        """Run all acts up to a time."""
        while self._heap and self._heap[0][0] <= until:
            when, _, timer = heapq.heappop(self._heap)
            act, timer.act = timer.act, None
            if act is None:
                continue
            self.now = max(self.now, when)
            self.steps += 1
            if self.steps == _MOST_STEPS:
                self._failed(RuntimeError(f"{_MOST_STEPS:,} events, and the day is not over"))
                self._heap.clear()
                break
            act()
        self.now = max(self.now, until)

    def thread(self, target: Callable[[], Any], process: Process | None = None) -> greenlet:
        """Start a thread of a process, the current one's by default."""
        owner = process or self.process
        assert owner is not None
        made = greenlet(lambda: self._body(target, owner), self._hub)
        owner.threads.append(made)
        self.after(0.0, lambda: self.resume(made, owner))
        return made

    def resume(
        self, thread: greenlet, process: Process, error: BaseException | None = None
    ) -> None:
        """Let a thread run until it waits again. Only the hub may call this without an error.

        ``error`` is raised in the thread first, as a signal handler does.
        """
        if not process.alive or thread.dead:
            return
        before, self.process = self.process, process
        try:
            if error is None:
                thread.switch()
            else:
                thread.throw(error)
        finally:
            self.process = before

    def sleep(self, seconds: float) -> None:
        """Let the current thread wait for some seconds."""
        thread, process = self._here()
        timer = self.after(max(0.0, seconds), lambda: self.resume(thread, process))
        try:
            self._away()
        finally:
            timer.cancel()

    def wait(self, event: Event, seconds: float | None = None) -> bool:
        """Let the current thread wait for an event; returns whether it came."""
        if event.flag:
            return True
        thread, process = self._here()
        waits = True

        def back() -> None:
            if waits:
                self.resume(thread, process)

        event.waiting.append(back)
        timer = None if seconds is None else self.after(seconds, back)
        try:
            self._away()
        finally:
            waits = False
            if back in event.waiting:
                event.waiting.remove(back)
            if timer is not None:
                timer.cancel()
        return event.flag

    def end(self, process: Process) -> None:
        """End a process: none of its threads runs again, not even for its cleanup."""
        process.alive = False
        self._dead += process.threads
        for end in process.ends:
            end()

    def discard_threads(self) -> None:
        """Discard the threads of dead processes at the end of a day."""
        for thread in self._dead:
            if not thread.dead:
                with suppress(BaseException):  # a thread may raise any error as it dies
                    thread.throw(GreenletExit)
        self._dead.clear()

    def _here(self) -> tuple[greenlet, Process]:
        assert self.process is not None, "only threads may wait"
        return getcurrent(), self.process

    def _away(self) -> None:
        process, loop = self.process, events._get_running_loop()
        task = None if loop is None else _swap_task(loop, None)
        events._set_running_loop(None)
        self._hub.switch()
        events._set_running_loop(loop)
        if task is not None:
            _swap_task(loop, task)
        self.process = process

    def _body(self, target: Callable[[], Any], owner: Process) -> None:
        try:
            target()
        except Exception as exc:  # noqa: BLE001 - whatever it is, a thread must not end so
            self._failed(exc)
        finally:
            here = getcurrent()
            if here in owner.threads:
                owner.threads.remove(here)


class Event:
    """``threading.Event`` in virtual time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.flag = False
        self.waiting: list[Callable[[], None]] = []

    def is_set(self) -> bool:
        return self.flag

    def set(self) -> None:
        self.flag = True
        self.poke()

    def poke(self) -> None:
        """End all waits as if their time had passed."""
        waiting, self.waiting = self.waiting, []
        for back in waiting:
            self._scheduler.after(0.0, back)

    def clear(self) -> None:
        self.flag = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._scheduler.wait(self, timeout)

    def wait_for(self, predicate: Callable[[], bool], seconds: float) -> bool:
        """Wait until a predicate holds or the time is over; returns whether it holds."""
        deadline = self._scheduler.now + seconds
        while not predicate() and self._scheduler.now < deadline:
            self.wait(deadline - self._scheduler.now)
        return predicate()
