"""The faults of a simulated day: each breaks something, and mends it later if it can."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from bench.simulation.engine import StartFault

if TYPE_CHECKING:
    from bench.simulation.engine import SimulatedEngine
    from bench.simulation.scenario import Day

MIB = 1 << 20
#: Seconds after which a supervisor, whose idle looks are rare here, has written its lease again.
_NOTED = 300.0
FAULTS: dict[str, Callable[[Day], None]] = {}


def fault(act: Callable[[Day], None]) -> Callable[[Day], None]:
    FAULTS[act.__name__] = act
    return act


def _engine(day: Day) -> SimulatedEngine | None:
    engines = list(day.world.machine.engines.values())
    return day.rng.choice(engines) if engines else None


def _kill(day: Day, *start_faults: StartFault) -> None:
    """Kill an engine; its next starts have these faults."""
    engine = _engine(day)
    if engine is not None:
        day.world.start_faults += start_faults
        engine.kill()


def _impair(day: Day, how: Literal["hung", "failing"], longest: float | None = None) -> None:
    """Impair an engine, for at most ``longest`` seconds or for ever."""
    engine = _engine(day)
    if engine is None:
        return
    setattr(engine, how, True)
    if engine.hung:
        day.world.invariants.engine_fails(engine)

    def mend() -> None:
        setattr(engine, how, False)

    if longest is not None:
        day.later(day.rng.uniform(1, longest), mend)


@fault
def engine_crashes(day: Day) -> None:
    engine = _engine(day)
    if engine is not None:
        day.world.invariants.engine_fails(engine)
        engine.crash()


@fault
def all_engines_killed(day: Day) -> None:
    for engine in list(day.world.machine.engines.values()):
        engine.kill()


@fault
def engine_killed_by_the_kernel(day: Day) -> None:
    engine = _engine(day)
    if engine is not None:
        day.world.machine.host_kills += 1
        engine.kill()


@fault
def connections_break(day: Day) -> None:
    engine = _engine(day)
    if engine is not None:
        for connection in list(engine.connections):
            connection.reset()
        engine.connections.clear()


@fault
def next_start_dies(day: Day) -> None:
    phase = day.rng.choice(("starting", "weights", "cache", "warm-up"))
    _kill(day, StartFault(dies=phase, how=day.rng.choice(("kill", "cuda", "python", "host"))))


@fault
def next_starts_die(day: Day) -> None:
    start_faults = [
        StartFault(dies=day.rng.choice(("starting", "weights", "warm-up")), how="kill")
        for _ in range(day.rng.randrange(2, 16))
    ]
    _kill(day, *start_faults)


@fault
def checkpoint_away(day: Day) -> None:
    """Kill an engine while the mount with the model's folder is away."""
    machine = day.world.machine
    machine.checkpoint_away = True
    _kill(day)
    day.later(day.rng.uniform(1, 900), lambda: setattr(machine, "checkpoint_away", False))


@fault
def next_start_is_stuck(day: Day) -> None:
    _kill(day, StartFault(stuck=day.rng.choice(("starting", "weights", "warm-up"))))


@fault
def next_start_is_slow(day: Day) -> None:
    _kill(day, StartFault(slow=day.rng.uniform(10, 1800)))


@fault
def engine_takes_more_than_its_forecast(day: Day) -> None:
    where = day.rng.choice(("weights", "serving"))
    _kill(day, StartFault(more=day.rng.choice((64, 128, 256, 512, 896)) * MIB, more_at=where))


@fault
def others_take_memory(day: Day) -> None:
    world = day.world
    index = day.rng.choice(list(world.machine.cards))
    card = world.machine.cards[index]
    size = min(card.free, day.rng.choice((256, 512, 1024, 4096, 8192)) * MIB)
    if size <= 0 or card.lost:
        return
    pid = world.new_stranger(index, size)
    day.later(day.rng.uniform(60, 7200), lambda: world.machine.release(pid))


@fault
def card_falls_off_the_bus(day: Day) -> None:
    machine = day.world.machine
    index = day.rng.choice(list(machine.cards))
    machine.cards[index].lost = True
    day.world.invariants.forget()
    for engine in list(machine.engines.values()):
        if index in engine.gpus:
            engine.crash()
    day.later(day.rng.uniform(60, 3600), lambda: setattr(machine.cards[index], "lost", False))


@fault
def nvml_does_not_answer(day: Day) -> None:
    machine = day.world.machine
    machine.nvml_broken = True
    day.later(day.rng.uniform(10, 1200), lambda: setattr(machine, "nvml_broken", False))


def _disk(day: Day, number: int) -> None:
    machine, seconds = day.world.machine, day.rng.uniform(10, 1800)
    if machine.disk_error is None:
        machine.disk_bad_since = day.world.scheduler.now
    machine.disk_error = number
    until = machine.disk_bad_until = max(machine.disk_bad_until, day.world.scheduler.now + seconds)

    def mend() -> None:
        if machine.disk_bad_until <= until:
            machine.disk_error = None
            for turbofit in (day.turbofit, *day.others):
                day.world.stir(turbofit.process)

    day.later(until - day.world.scheduler.now, mend)


@fault
def disk_slow(day: Day) -> None:
    machine, now = day.world.machine, day.world.scheduler.now
    before = machine.disk_slowest if now <= machine.disk_slow_until else 0.0
    machine.disk_seconds = day.rng.uniform(0.1, 20)
    machine.disk_slowest = max(before, machine.disk_seconds)
    seconds = day.rng.uniform(10, 600)
    # A write that begins in the last moment is held up as long.
    until = now + seconds + machine.disk_seconds
    machine.disk_slow_until = max(machine.disk_slow_until, until)
    day.later(seconds, lambda: setattr(machine, "disk_seconds", 0.0))


@fault
def turbofit_killed_and_its_guards(day: Day) -> None:
    """Kill turbofit and its guards: its engines live on with their memory, named by the lease.

    While the disk is broken or slow, or was so recently, the guards work: no file might name the
    engines, and nobody could end them.
    """
    process = day.turbofit.process
    world = day.world
    machine = world.machine
    noted = world.scheduler.now > max(machine.disk_bad_until, machine.disk_slow_until) + _NOTED
    if process is not None and noted:
        for engine in machine.engines.values():
            if engine.owner is process and engine.kill in process.ends:
                process.ends.remove(engine.kill)
    day.turbofit.kill()


@fault
def sigterm_while_it_starts(day: Day) -> None:
    day.turbofit.kill()
    day.later(day.rng.uniform(0, 400), lambda: day.turbofit.signal(signal.SIGTERM))


@fault
def sigint_twice(day: Day) -> None:
    day.turbofit.signal(signal.SIGINT)
    day.later(day.rng.uniform(0, 5), lambda: day.turbofit.signal(signal.SIGINT))


@fault
def clock_jumps(day: Day) -> None:
    """Move the wall clock by up to a day."""
    day.world.scheduler.skew += day.rng.uniform(-90000, 90000)


@fault
def flood(day: Day) -> None:
    many = day.rng.choices((10, 30, 100, 300), weights=(4, 3, 2, 1))[0]
    for _ in range(many):
        day.request(within=1.0)


@fault
def clients_leave(day: Day) -> None:
    for _ in range(10):
        day.request(within=1.0, leaves=day.rng.uniform(0.001, 1.0))


FAULTS |= {
    "engine_killed": _kill,
    "engine_hangs": partial(_impair, how="hung"),
    "engine_stalls_and_goes_on": partial(_impair, how="hung", longest=300),
    "engine_answers_500": partial(_impair, how="failing", longest=1200),
    "disk_full": partial(_disk, number=errno.ENOSPC),
    "disk_fails": partial(_disk, number=errno.EIO),
    "torn_write": lambda day: setattr(day.world, "tear_next", True),
    "turbofit_killed": lambda day: day.turbofit.kill(),
    "sigterm": lambda day: day.turbofit.signal(signal.SIGTERM),
    "another_turbofit_starts": lambda day: day.another(),
    "killing_request": lambda day: day.poison(),
}
