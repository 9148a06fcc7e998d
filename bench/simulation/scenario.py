"""A simulated day: turbofit serves, clients ask, faults come; then it must serve as before."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from bench.simulation.clients import Request
from bench.simulation.faults import FAULTS
from bench.simulation.substitutes import in_place
from bench.simulation.world import Result, World
from turbofit.core.errors import TurbofitError

if TYPE_CHECKING:
    from bench.simulation.scheduler import Process
    from turbofit.serving.options import ServeConfig

DAY = 86_400.0
#: The last two hours are without faults: turbofit must serve at their end.
CALM = 7_200.0
LEAST_FAULTS, MOST_FAULTS = 20, 26
#: A start's deadline, several of them, and the rest in between.
_BACK = 300.0
#: What few days have besides, each by numbers of its own: the part of the days that have it.
#: ``at once`` is `Day._poison_at_once`, ``hours`` `Day._poison_for_hours`, ``varies``
#: `Day._poison_varies`.
KINDS = {"at once": 0.1, "hours": 0.1, "varies": 0.1}
_SETUPS = (
    ("1xrtx3090", "internvl2-8b", {}),
    ("2xrtx3090", "internvl2-8b", {}),
    ("2xrtx3090", "internvl2-8b", {"tp": 2}),
    ("4xrtx3090", "internvl2-2b", {}),
    ("1xrtx3060", "internvl2-2b", {}),
    # The vision units in flight are limited here, and the cache may run out.
    ("2xrtx3090", "qwen2-vl-7b", {"queue_images": True}),
    # Simulated engines take memory as TurboMind does.
    ("1xrtx4060", "qwen2-vl-2b", {"engine": "turbomind"}),
    ("2xrtx4060", "qwen2-vl-2b", {"engine": "turbomind"}),
)
_SIZES = ((448, 448), (896, 448), (896, 896), (1792, 1344), (3584, 2688))


def of_kind(kind: str, seed: int) -> random.Random | None:
    """The numbers that decide about a kind of day; None for a day that is not of it."""
    rare = random.Random(f"{kind} {seed}")
    return rare if rare.random() < KINDS[kind] else None


class Turbofit:
    """One `turbofit serve` under a service manager.

    Args:
        day: where it runs.
        model: what it serves.
        fixed: what its user set.
        primary: whether clients ask it.
    """

    def __init__(
        self, day: Day, model: str, fixed: dict[str, Any], *, primary: bool = True
    ) -> None:
        self._day, self._model, self._fixed = day, model, fixed
        self._primary = primary
        self._stop: Any = None
        self._main: Any = None
        self.process: Process | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        self.process = self._day.world.turbofit(self._run, primary=self._primary)
        self._main = self.process.threads[0]
        if self._primary:
            self.process.ends.append(self._day.ended)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self._day.world.kill(self.process)

    def signal(self, number: signal.Signals) -> None:
        """As `kill` sends it."""
        from turbofit.core.process.signals import StoppedError

        world, process = self._day.world, self.process
        if process is None or not process.alive or self._stop is None:
            return
        world.trace(f"{number.name} to turbofit {process.pid}")
        before, world.scheduler.process = world.scheduler.process, process
        try:
            self._stop._caught(number, None)
        except StoppedError as exc:
            world.scheduler.resume(self._main, process, exc)
        finally:
            world.scheduler.process = before
        world.stir(process)

    def _run(self) -> int:
        from turbofit.cli.terminal.output import exit_code, say
        from turbofit.core.process.signals import StoppedError, StopSignal
        from turbofit.serving.leases import Leases
        from turbofit.serving.run import Run
        from turbofit.serving.start import follow

        self._stop = StopSignal()
        config = serve_question(self._model, tuple(self._fixed.items()), "m")
        try:
            with Leases() as leases:
                run = Run(config, leases, say)
                run.prepare()
                run.begin()
                ended = follow(run, self._stop)
        except StoppedError as exc:
            ended = exc.signal
        except TurbofitError as exc:
            world = self._day.world
            world.trace(f"error: {exc.message} | {exc.hint}")
            if not exc.hint:
                world.violate(f"an error without a hint: {exc.message}")
            return int(exc.exit_code)
        return exit_code(ended)


@cache
def serve_question(
    model: str, fixed: tuple[tuple[str, Any], ...], name: str | None = None
) -> ServeConfig:
    """The request of `serve`; ``name``: the model's name for clients."""
    from turbofit.gateway.config import GatewayConfig
    from turbofit.planning.request import PlanRequest
    from turbofit.serving.engine.engine_client import Timing
    from turbofit.serving.options import ServeConfig

    return ServeConfig.of(
        request=PlanRequest(model=model, **dict(fixed)),
        # Clients that ask again and again ask less often than in use: a day has 86,400 seconds.
        gateway=GatewayConfig(idle_seconds=5400.0, retry_seconds=30.0),
        timing=Timing(liveness=1800.0, start=1800.0),
        access_log="none",
        no_rehearse=True,
        model_name=name,
    )


class Day:
    """One simulated day, from its start to its end."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        spec, model, fixed = self.rng.choice(_SETUPS)
        self.world = World(seed, spec)
        self.number = self.rng.randrange(LEAST_FAULTS, MOST_FAULTS)
        #: What clients ask.
        self.turbofit = Turbofit(self, model, fixed)
        self.others: list[Turbofit] = []
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
            stream=rng.random() < 0.5, tokens=rng.randrange(1, 6), stated=rng.random() < 0.5,
            text=f"ask {rng.random()}",
            leaves=leaves if leaves is not None else rng.choice((None, None, None, 2.0)),
        )  # fmt: skip
        self.later(rng.uniform(0, within), lambda: self._send(one))

    def poison(self) -> None:
        """A client whose request ends engines sends it again and again."""
        rng, times = self.rng, self.rng.randrange(1, 6)
        text = f"poison {rng.random()}"
        for number in range(times):
            self._poison(self.world.scheduler.now + number * rng.uniform(0.5, 30), text)

    def _poison(self, when: float, text: str, leaves: float | None = None) -> None:
        one = Request(number=0, client="10.0.1.1", poison=True, text=text, leaves=leaves)
        self.world.scheduler.at(when, lambda: self._send(one))

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
            limits = plan.promise.limits
            units = sum(rule.units(*size, limits.image_limit) for size in one.images)
            # Images that are too many together are made smaller by the gateway.
            one.units = min(units, limits.units_per_request)
        world.send(one)

    def ended(self) -> None:
        """However it ended, it is started again."""

        def again() -> None:
            if not self.over:
                self.turbofit.start()

        if not self.over:
            self.later(self.rng.uniform(1, _BACK), again)

    # -- the whole

    def run(self) -> Result:
        """Let the day pass."""
        world, rng = self.world, self.rng
        with in_place(world):
            self._schedule(rng)
            world.scheduler.run(world.scheduler.now + DAY)
            self._end()
            # Before the threads that are left are ended, which is no part of the history.
            return world.result()

    def _schedule(self, rng: random.Random) -> None:
        world, begin = self.world, self.world.scheduler.now
        calm = begin + DAY - CALM
        self.turbofit.start()
        names = sorted(FAULTS)
        faults = 0
        while faults < self.number:
            when = begin + rng.uniform(1.0, DAY - CALM)
            # Faults come in clusters: most bugs need two.
            for _ in range(rng.choice((1, 1, 2))):
                name = rng.choice(names)
                world.scheduler.at(min(when, calm), lambda name=name: self._fault(name))
                when += rng.choice((0.0, rng.uniform(0, 2), rng.uniform(0, 60)))
                faults += 1
            for _ in range(rng.randrange(3)):
                world.scheduler.at(when - rng.uniform(0, 3), lambda: self.request(within=1.0))
        for _ in range(12):
            world.scheduler.at(begin + rng.uniform(0, DAY), lambda: self.request(within=30))
        if rng.random() < 0.5:
            when = begin + rng.uniform(600.0, DAY - CALM)
            world.scheduler.at(when, self.another)
            world.scheduler.at(when + rng.uniform(-0.1, 0.1), lambda: self._fault("engine_killed"))
        for kind, act in (
            ("hours", self._poison_for_hours), ("at once", self._poison_at_once),
            ("varies", self._poison_varies),
        ):  # fmt: skip
            rare = of_kind(kind, world.seed)
            if rare is not None:
                act(rare, begin, calm)
        world.scheduler.at(calm, self._calm)

    def _poison_for_hours(self, rare: random.Random, begin: float, calm: float) -> None:
        """Let a client send a poisonous request for hours, through all faults."""
        text, when = f"poison {rare.random()}", rare.uniform(begin, calm)
        end = min(calm, when + rare.uniform(1.0, 8.0) * 3600.0)
        while when < end:
            self._poison(when, text)
            when += rare.uniform(30.0, 1500.0)

    def _poison_at_once(self, rare: random.Random, begin: float, calm: float) -> None:
        """In few days a client sends its killing request several times at once, and hangs up.

        It sends it twice more within minutes.
        """
        for _ in range(rare.randrange(1, 6)):
            when, text = rare.uniform(begin, calm), f"poison {rare.random()}"
            within = rare.choice((0.0, 0.01, 0.05, 1.0))
            for _ in range(rare.randrange(2, 12)):
                leaves = rare.choice((None, None, None, 0.01, 0.05))
                self._poison(when + rare.uniform(0.0, within), text, leaves)
            for _ in range(2):
                when += rare.uniform(60.0, 600.0)
                self._poison(when, text)

    def _poison_varies(self, rare: random.Random, begin: float, calm: float) -> None:
        """In few days a client sends a new killing request each time, beside others' requests."""
        when = rare.uniform(begin, calm - 3600.0)
        end = when + 3600.0
        while when < end:
            self._poison(when, f"poison {rare.random()}")
            for _ in range(rare.randrange(3)):
                self.world.scheduler.at(when, lambda: self.request(within=2.0))
            when += rare.uniform(5.0, 120.0)

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
        machine.checkpoint_away = False
        for index, card in machine.cards.items():
            card.lost = False
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
        """Check that turbofit serves, and that it ends in order."""
        world = self.world
        scheduler = world.scheduler
        last = Request(number=0, client="10.0.2.1", text="last")
        self._send(last)
        scheduler.run(scheduler.now + 60)
        if last.end != "200":
            world.violate(f"two hours after the last fault a request ends with {last.end!r}")
        elif self.turbofit.process is not None:
            world.invariants.serves_by_its_record(self.turbofit.process)
        self.over = True
        if self.turbofit.alive:
            self.turbofit.signal(signal.SIGTERM)
            scheduler.run(scheduler.now + 120)
        for one in (self.turbofit, *self.others):
            if one.alive:
                world.violate("a turbofit did not end within 120 s of SIGTERM")
        scheduler.run(scheduler.now + 10)
        world.invariants.nothing_left(self.turbofit.process)


def simulate(seed: int) -> Result:
    """The history of a seed."""
    return Day(seed).run()
