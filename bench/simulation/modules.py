"""``time``, ``threading`` and ``os`` as turbofit's modules see them in a simulated world."""

from __future__ import annotations

import os
import threading
import time
import types
from typing import TYPE_CHECKING, Any

from bench.simulation.scheduler import Event

if TYPE_CHECKING:
    from bench.simulation.world import World

__all__ = [
    "DiskOs",
    "LeaseOs",
    "SimulatedThreading",
    "SimulatedTime",
    "SupervisorTime",
    "TornWrite",
    "current",
    "world",
]

#: The world that everything belongs to at this moment.
current: list[World] = []


def world() -> World:
    """The newest one."""
    return current[-1]


class SimulatedTime(types.ModuleType):
    """``time`` as turbofit's modules see it."""

    def __init__(self) -> None:
        super().__init__("time")

    def monotonic(self) -> float:
        return world().scheduler.now

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        return int(world().scheduler.now * 1e9)

    def time(self) -> float:
        one = world().scheduler
        return 1.8e9 + one.now + one.skew

    def sleep(self, seconds: float) -> None:
        world().scheduler.sleep(seconds)

    def strftime(self, form: str, when: Any = None) -> str:
        return time.strftime(form, when or time.gmtime(self.time()))

    def clock_gettime(self, _: int) -> float:
        return world().scheduler.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class SupervisorTime(SimulatedTime):
    """``time`` as the supervisor sees it, whose pauses end when there is something to see."""

    def sleep(self, seconds: float) -> None:
        world().rest(seconds)


class _WakingEvent(Event):
    """An event that a supervisor looks at."""

    def set(self) -> None:
        super().set()
        world().wake.set()


class SimulatedThreading(types.ModuleType):
    """``threading`` with events in virtual time."""

    def __init__(self) -> None:
        super().__init__("threading")

    def Event(self) -> Event:  # noqa: N802
        return _WakingEvent(world().scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


class TornWrite(Exception):  # noqa: N818 - no error: the kernel ends turbofit here
    pass


class DiskOs(types.ModuleType):
    """``os`` for `core.files`: a write that is to be torn does not come to its end."""

    def __init__(self) -> None:
        super().__init__("os")
        self.torn = False

    def replace(self, source: Any, target: Any) -> None:
        if self.torn:
            raise TornWrite
        os.replace(source, target)

    def unlink(self, path: Any) -> None:
        if not self.torn:
            os.unlink(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class LeaseOs(types.ModuleType):
    """``os`` for the leases: what a process has open goes with it."""

    def __init__(self) -> None:
        super().__init__("os")

    def open(self, *arguments: Any, **named: Any) -> int:
        process = world().scheduler.process
        descriptor = os.open(*arguments, **named)
        if process is not None:
            process.descriptors.append(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        process = world().scheduler.process
        if process is not None and descriptor in process.descriptors:
            process.descriptors.remove(descriptor)
            os.close(descriptor)

    def fdopen(self, descriptor: int, *given: Any) -> Any:
        process = world().scheduler.process
        if process is not None:
            process.descriptors.remove(descriptor)
        return os.fdopen(descriptor, *given)

    def getpid(self) -> int:
        process = world().scheduler.process
        return process.pid if process is not None else 1

    def killpg(self, pid: int, number: int) -> None:
        engine = world().machine.engines.get(pid)
        if engine is None:
            raise ProcessLookupError(3, "No such process")
        engine.kill(number)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)
