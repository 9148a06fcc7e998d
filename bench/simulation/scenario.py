"""A simulated day: turbofit serves, clients ask, faults come; then it must serve as before."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from typing import Any

from bench.simulation.batch import Batch
from bench.simulation.calibration import Calibration
from bench.simulation.clients import Request
from bench.simulation.commands import Turbofit
from bench.simulation.faults import FAULTS
from bench.simulation.history import Result
from bench.simulation.network import Network
from bench.simulation.substitutes import in_place
from bench.simulation.world import World

__all__ = ["Day", "simulate"]

DAY = 86_400.0
#: The last two hours are without faults: turbofit must serve at their end.
CALM = 7_200.0
LEAST_FAULTS, MOST_FAULTS = 20, 26
#: A start's deadline, several of them, and the rest in between.
_BACK = 300.0
#: Part of the days in which `Day._poison_after_restart` happens.
_RARE = 0.1
#: What few days have besides, each by numbers of its own: the part of the days that have it.
#: ``at once`` is `Day._poison_at_once`, ``hours`` `Day._poison_for_hours`, ``network``
#: `Day._break_answers`; ``chosen engine`` is the PyTorch one.
KINDS = {
    "at once": 0.05, "batch": 0.05, "calibration": 0.05, "chosen engine": 0.1, "hours": 0.05,
    "network": 0.05,
}  # fmt: skip
_SETUPS = (
    ("1xrtx3090", "internvl2-8b", {}),
    ("2xrtx3090", "internvl2-8b", {}),
    ("2xrtx3090", "internvl2-8b", {"tp": 2}),
    ("4xrtx3090", "internvl2-2b", {}),
    ("1xrtx3060", "internvl2-2b", {}),
    # The vision units in flight are limited here, and the cache may run out.
    ("2xrtx3090", "qwen2-vl-7b", {"queue_images": True}),
    ("1xrtx4060", "qwen2-vl-2b", {}),
    ("2xrtx4060", "qwen2-vl-2b", {}),
)
_SIZES = ((448, 448), (896, 448), (896, 896), (1792, 1344), (3584, 2688))


def of_kind(kind: str, seed: int) -> random.Random | None:
    """The numbers that decide about a kind of day; None for a day that is not of it."""
    rare = random.Random(f"{kind} {seed}")
    # Together they would hide what each of them is for.
    if kind == "network" and of_kind("hours", seed) is not None:
        return None
    return rare if rare.random() < KINDS[kind] else None


class Day:
    """One history."""

    def __init__(self, seed: int, *, seconds: float = DAY, faults: int | None = None) -> None:
        self.rng = random.Random(seed)
        #: Of what few days have, so that the others are as they were without.
        self.rare = random.Random(f"rare {seed}")
        spec, model, fixed = self.rng.choice(_SETUPS)
        if of_kind("chosen engine", seed) is not None:
            fixed = {**fixed, "engine": "pytorch"}
        self.world = World(seed, spec)
        self.seconds = seconds
        self.number = faults or self.rng.randrange(LEAST_FAULTS, MOST_FAULTS)
        self._serve = Turbofit(self, model, fixed)
        self._calibrate = self._calibration(of_kind("calibration", seed), model, fixed)
        #: What clients ask, if it serves.
        self.turbofit = self._calibrate or self._serve
        self.others: list[Turbofit] = []
        self.batch: Batch | None = None
        self.over = False

    # -- what happens

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.world.scheduler.after(seconds, act)

    def request(self, *, within: float = 0.0, leaves: float | None = None) -> None:
        """A client asks something soon."""
        rng = self.rng
        sizes = rng.choices(_SIZES, k=rng.choice((0, 0, 1, 1, 1, 2)))
        one = Request(
            number=0, client=f"10.0.0.{rng.randrange(20)}", images=tuple(sizes),
            stream=rng.random() < 0.5, tokens=rng.randrange(1, 6),
            leaves=leaves if leaves is not None else rng.choice((None, None, None, 2.0)),
        )  # fmt: skip
        self.later(rng.uniform(0, within), lambda: self._send(one))

    def poison(self) -> None:
        """A client whose request ends engines sends it again and again."""
        rng, times = self.rng, self.rng.randrange(1, 6)
        text = f"poison {rng.random()}"
        for number in range(times):
            one = Request(number=0, client="10.0.1.1", poison=True, text=text)
            self.later(number * rng.uniform(0.5, 30), lambda one=one: self._send(one))

    def another(self) -> None:
        """A second turbofit on the same machine, for a while."""
        one = Turbofit(self, "internvl2-1b", {}, primary=False)
        self.others.append(one)
        one.start()
        end = self.rng.choice((one.kill, lambda: one.signal(signal.SIGTERM)))
        self.later(self.rng.uniform(10, 7200), end)

    def _send(self, one: Request) -> None:
        world = self.world
        one.number = len(world.requests)
        process = self.turbofit.process
        plans = world.plans.get(process.pid, []) if process is not None else []
        plan = plans[-1][1] if plans else None
        rule = None if plan is None else plan.model.image_rule
        if plan is not None and rule is not None:
            limits = plan.limits
            units = sum(rule.units(*size, limits.image_limit) for size in one.images)
            # Images that are too many together are made smaller by the gateway.
            one.units = min(units, limits.units_per_request)
        world.send(one)

    def _send_at(self, when: float, one: Request) -> None:
        self.world.scheduler.at(when, lambda: self._send(one))

    def ended(self) -> None:
        """However it ended, it is started again."""
        if not self.over:
            self.later(self.rng.uniform(1, _BACK), self._again)

    def _again(self) -> None:
        if not self.over:
            if self._calibrate is not None and self._calibrate.over:
                self.turbofit = self._serve
            self.turbofit.start()

    # -- the whole

    def run(self) -> Result:
        """Let the day pass."""
        world, rng = self.world, self.rng
        with in_place(world):
            self._schedule(rng)
            world.scheduler.run(world.scheduler.now + self.seconds)
            self._end()
            # Before the threads that are left are ended, which is no part of the history.
            return world.result()

    def _schedule(self, rng: random.Random) -> None:
        world, begin = self.world, self.world.scheduler.now
        calm = begin + self.seconds - CALM
        self._again()
        names = sorted(FAULTS)
        faults = 0
        while faults < self.number:
            when = begin + rng.uniform(1.0, self.seconds - CALM)
            # Faults come in clusters: most bugs need two.
            for _ in range(rng.choice((1, 1, 2))):
                name = rng.choice(names)
                world.scheduler.at(min(when, calm), lambda name=name: self._fault(name))
                when += rng.choice((0.0, rng.uniform(0, 2), rng.uniform(0, 60)))
                faults += 1
            for _ in range(rng.randrange(3)):
                world.scheduler.at(when - rng.uniform(0, 3), lambda: self.request(within=1.0))
        for _ in range(12):
            world.scheduler.at(
                begin + rng.uniform(0, self.seconds), lambda: self.request(within=30)
            )
        if rng.random() < 0.5:
            when = begin + rng.uniform(600.0, self.seconds - CALM)
            world.scheduler.at(when, self.another)
            world.scheduler.at(when + rng.uniform(-0.1, 0.1), lambda: self._fault("engine_killed"))
        if self.rare.random() < _RARE:
            world.scheduler.at(
                begin + self.rare.uniform(0.0, self.seconds - CALM), self._poison_after_restart
            )
        self._poison_for_hours(of_kind("hours", world.seed), begin)
        self._poison_at_once(of_kind("at once", world.seed), begin)
        self._break_answers(of_kind("network", world.seed), begin)
        self._batch(of_kind("batch", world.seed), begin)
        world.scheduler.at(calm, self._calm)

    def _calibration(
        self, rare: random.Random | None, model: str, fixed: dict[str, Any]
    ) -> Calibration | None:
        """In few days somebody calibrates first, and faults come meanwhile."""
        if rare is None:
            return None
        names = sorted(FAULTS)
        for _ in range(rare.randrange(4)):
            name = rare.choice(names)
            self.later(rare.uniform(0.0, 200.0), lambda name=name: self._fault(name))
        return Calibration(self, model, fixed, rare)

    def _poison_for_hours(self, rare: random.Random | None, begin: float) -> None:
        """In few days a client does not give up, whatever turbofit goes through meanwhile."""
        if rare is None:
            return
        calm, text = begin + self.seconds - CALM, f"poison {rare.random()}"
        when = rare.uniform(begin, calm)
        end = min(calm, when + rare.uniform(1.0, 8.0) * 3600.0)
        while when < end:
            one = Request(number=0, client="10.0.1.3", poison=True, text=text)
            self._send_at(when, one)
            when += rare.uniform(30.0, 1500.0)

    def _poison_at_once(self, rare: random.Random | None, begin: float) -> None:
        """In few days a client sends its killing request several times at once, and hangs up.

        It sends it twice more within minutes. Connections to engines take longer on some of these
        days, so that an engine's end may meet one that is being made.
        """
        if rare is None:
            return
        bursts = []
        for _ in range(rare.randrange(1, 6)):
            when = rare.uniform(begin, begin + self.seconds - CALM)
            text, within = f"poison {rare.random()}", rare.choice((0.0, 0.01, 0.05, 1.0))
            bursts.append((when, text))
            for _ in range(rare.randrange(2, 12)):
                one = Request(
                    number=0, client="10.0.1.4", poison=True, text=text,
                    leaves=rare.choice((None, None, None, 0.01, 0.05)),
                )  # fmt: skip
                at = when + rare.uniform(0.0, within)
                self._send_at(at, one)
        self.world.network = Network(connect=rare.choice((0.0001, 0.01, 0.05)))
        for when, text in bursts:
            later = when
            for _ in range(2):
                later += rare.uniform(60.0, 600.0)
                one = Request(number=0, client="10.0.1.4", poison=True, text=text)
                self._send_at(later, one)

    def _break_answers(self, rare: random.Random | None, begin: float) -> None:
        """In few days requests and answers are on their way for a while, and engines end meanwhile.

        Some end of a request that is sent several times, before the answer begins or within it.
        """
        if rare is None:
            return
        scheduler, calm = self.world.scheduler, begin + self.seconds - CALM
        self.world.network = Network.drawn(rare)
        for _ in range(rare.randrange(2, 9)):
            when = rare.uniform(begin, calm)
            self._ask_together(rare, when, rare.randrange(1, 6))
            name = rare.choice(("engine_killed", "engine_crashes", "connections_break"))
            scheduler.at(when + rare.uniform(0.0, 2.0), lambda name=name: self._fault(name))
        for _ in range(rare.randrange(4)):
            when, text = rare.uniform(begin, calm), f"poison {rare.random()}"
            # After the longer times an answer in one piece would be there already.
            stream, after = rare.random() < 0.5, rare.choice((0.0005, 0.03, 0.2, 1.0))
            after = after if stream else min(after, 0.03)
            for _ in range(rare.randrange(1, 8)):
                one = Request(
                    number=0, client="10.0.1.5", poison=True, text=text, stream=stream,
                    tokens=5, ends_after=after, leaves=rare.choice((None, None, None, 0.05)),
                )  # fmt: skip
                self._send_at(when, one)
                if rare.random() < 0.3:
                    self._ask_together(rare, when - 0.5, rare.randrange(1, 6))
                when += rare.choice((0.0, rare.uniform(0.0, 0.1), rare.uniform(0.0, 60.0)))

    def _ask_together(self, rare: random.Random, when: float, number: int) -> None:
        """Several clients ask within a second."""
        for _ in range(number):
            one = Request(
                number=0, client=f"10.0.4.{rare.randrange(20)}", tokens=rare.randrange(1, 6),
                stream=rare.random() < 0.5, leaves=rare.choice((None, None, None, 0.01, 0.3)),
            )  # fmt: skip
            at = when + rare.uniform(0.0, 1.0)
            self._send_at(at, one)

    def _batch(self, rare: random.Random | None, begin: float) -> None:
        """In few days somebody runs a batch, and faults come meanwhile."""
        if rare is None:
            return
        scheduler, calm = self.world.scheduler, begin + self.seconds - CALM
        when = rare.uniform(begin, calm)
        self.batch = Batch(self.world, rare)
        scheduler.at(when, self.batch.start)
        names = sorted(FAULTS)
        for _ in range(rare.randrange(3)):
            name, at = rare.choice(names), min(when + rare.uniform(0.0, 100.0), calm)
            scheduler.at(at, lambda name=name: self._fault(name))

    def _poison_after_restart(self) -> None:
        """Idle engines end and start again; the first request that they get kills them."""
        self._fault("all_engines_killed")
        wait, text = self.rare.uniform(100.0, 1000.0), f"poison {self.rare.random()}"
        for number in range(3):
            one = Request(number=0, client="10.0.1.2", poison=True, text=text)
            self.later(wait + 40.0 * number, lambda one=one: self._send(one))

    def _fault(self, name: str) -> None:
        self.world.trace(f"fault {name}")
        self.world.count(f"fault {name}")
        FAULTS[name](self)
        for monitor in list(self.world.monitors):
            monitor.poke()

    def _calm(self) -> None:
        """Everything from outside is well again."""
        world = self.world
        world.trace("calm")
        world.start_faults.clear()
        world.tear_next = False
        machine = world.machine
        machine.nvml_broken, machine.disk_error, machine.disk_seconds = False, None, 0.0
        machine.ports = {port: one for port, one in machine.ports.items() if one is not None}
        for index, card in machine.cards.items():
            card.lost = card.hot = False
            for pid in list(card.held):
                if pid not in machine.engines:
                    machine.release(pid, index)
        world.stir(self.turbofit.process)
        for one in self.others:
            one.signal(signal.SIGTERM)
        for engine in list(machine.engines.values()):
            if engine.fault.more:  # which may show itself as late as at the last request
                engine.kill()

    def _end(self) -> None:
        """It must serve now, and end in order."""
        world = self.world
        scheduler = world.scheduler
        last = Request(number=0, client="10.0.2.1", text="last")
        self._send(last)
        scheduler.run(scheduler.now + 60)
        if last.end != "200":
            world.violate(f"two hours after the last fault a request ends with {last.end!r}")
        elif self.turbofit.process is not None:
            world.invariants.serves_by_its_record(self.turbofit.process)
        if self.batch is not None:
            self.batch.check()
        self.over = True
        if self.turbofit.alive:
            self.turbofit.signal(signal.SIGTERM)
            scheduler.run(scheduler.now + 120)
        for one in (self.turbofit, *self.others):
            if one.alive:
                world.violate("a turbofit did not end within 120 s of SIGTERM")
        scheduler.run(scheduler.now + 10)
        world.invariants.nothing_left(self.turbofit.process)


def simulate(seed: int, **given: Any) -> Result:
    """The history of a seed."""
    return Day(seed, **given).run()
