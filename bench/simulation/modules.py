"""``time``, ``threading`` and ``os`` as turbofit's modules see them in a simulated world."""

from __future__ import annotations

import os
import threading
import time
import types
from typing import TYPE_CHECKING, Any

from bench.simulation.scheduler import Event

if TYPE_CHECKING:
    from bench.simulation.scheduler import Scheduler
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


class _Module(types.ModuleType):
    """A module of which some names are others."""

    def __init__(self, of: types.ModuleType) -> None:
        super().__init__(of.__name__)
        ours = {name for kind in type(self).__mro__[:-2] for name in vars(kind)}
        vars(self).update({name: one for name, one in vars(of).items() if name not in ours})


class SimulatedTime(_Module):
    """``time`` as turbofit's modules see it."""

    def __init__(self) -> None:
        super().__init__(time)

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


class SupervisorTime(SimulatedTime):
    """``time`` as the supervisor sees it, whose pauses end when there is something to see."""

    def sleep(self, seconds: float) -> None:
        world().rest(seconds)


class _WakingEvent(Event):
    """An event that a supervisor looks at."""

    def set(self) -> None:
        super().set()
        world().stir()


class _PokedEvent(_WakingEvent):
    """One whose waits end sooner where there is something to see.

    Args:
        scheduler: the time.
        among: those that are waited for just now.
    """

    def __init__(self, scheduler: Scheduler, among: dict[Event, None]) -> None:
        super().__init__(scheduler)
        self._among = among

    def wait(self, timeout: float | None = None) -> bool:
        self._among[self] = None
        try:
            return super().wait(timeout)
        finally:
            self._among.pop(self, None)


class SimulatedThreading(_Module):
    """``threading`` with events in virtual time.

    Args:
        among: names what `World` has of events whose waits it ends.
    """

    def __init__(self, among: str = "") -> None:
        super().__init__(threading)
        self._events = among

    def Event(self) -> Event:  # noqa: N802
        one = world()
        if self._events:
            return _PokedEvent(one.scheduler, getattr(one, self._events))
        return _WakingEvent(one.scheduler)


class TornWrite(Exception):  # noqa: N818 - no error: the kernel ends turbofit here
    pass


class DiskOs(_Module):
    """``os`` for `core.process.files`: a write that is to be torn does not come to its end."""

    def __init__(self) -> None:
        super().__init__(os)
        self.torn = False

    def replace(self, source: Any, target: Any) -> None:
        if self.torn:
            raise TornWrite
        os.replace(source, target)

    def unlink(self, path: Any) -> None:
        if not self.torn:
            os.unlink(path)

    def fsync(self, descriptor: int) -> None:
        """Nothing is lost: memory is the disk."""


class LeaseOs(_Module):
    """``os`` for the leases: what a process has open goes with it."""

    def __init__(self) -> None:
        super().__init__(os)

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
