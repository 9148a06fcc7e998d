"""`turbofit calibrate` in a simulated day: cut off, and run again, before `turbofit serve`."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from bench.simulation.commands import Turbofit
from bench.simulation.modules import CalibratorThreading, world
from bench.simulation.nvml import SimulatedNvml
from turbofit.launch.serve.planner import Planner
from turbofit.observe.sampler import Sampler

if TYPE_CHECKING:
    from bench.simulation.scenario import Day
    from bench.simulation.world import World

__all__ = ["Calibration", "replacements"]

MIB, GIB = 1 << 20, 1 << 30
#: Bytes that an engine's context takes beyond the estimate; more would be past the margin.
_BEYOND = (-256 * MIB, -96 * MIB, 0, 48 * MIB, 128 * MIB)
#: So often somebody runs it, at most.
_RUNS = 6
#: About as long as a run takes.
_SECONDS = 150.0
#: Part of the days in which somebody else gives memory back meanwhile, and of the runs that are
#: killed at their end.
_PART = 0.3


class Calibration(Turbofit):
    """Learns what the cards' contexts take beyond the estimates.

    Args:
        day: where it runs.
        model: what is measured.
        fixed: what its user set.
        rng: decides what there is to be learned.
    """

    def __init__(self, day: Day, model: str, fixed: dict[str, Any], rng: random.Random) -> None:
        super().__init__(day, model, fixed)
        world, self._rng = day.world, rng
        world.calibrates, world.machine.beyond = True, rng.choice(_BEYOND)
        self._runs, self._complete = rng.randrange(1, _RUNS + 1), False
        if rng.random() < _PART:
            stranger = world.new_stranger(rng.choice(list(world.machine.cards)), GIB)
            day.later(rng.uniform(0.0, _SECONDS), lambda: world.machine.release(stranger))

    @property
    def over(self) -> bool:
        """Whether nobody runs it again."""
        return self._complete or not self._runs

    def start(self) -> None:
        self._runs -= 1
        super().start()
        cut = self._rng.choice((None, self._kill_soon, self._stop_soon))
        if cut is not None:
            cut()

    def _command(self, stop: Any) -> Any:
        from turbofit.cli.commands.calibrate import _calibrate
        from turbofit.launch.serve.leases import Leases

        if self._rng.random() < _PART:
            stop.end = partial(self._kill_at_end, stop.end)
        with Leases() as leases:
            ended = _calibrate(_question(self._model, tuple(self._fixed.items())), stop, leases)
        self._complete = ended is None
        return ended

    def _kill_soon(self) -> None:
        assert self.process is not None
        self._day.later(
            self._rng.uniform(0.0, _SECONDS), partial(self._day.world.kill, self.process)
        )

    def _stop_soon(self) -> None:
        self._day.later(self._rng.uniform(0.0, _SECONDS), partial(self.signal, signal.SIGINT))

    def _kill_at_end(self, end: Callable[[], None]) -> None:
        """All is measured; it is killed before it has learned of it, or while it does."""
        end()
        self._day.later(self._rng.uniform(0.0, 0.6), self.kill)


@cache
def _question(model: str, fixed: tuple[tuple[str, Any], ...]) -> Any:
    """The command line of `calibrate`."""
    from turbofit.cli.commands.calibrate import _CalibrateArguments
    from turbofit.cli.options.launch_options import CalibrateOptions
    from turbofit.planning.request import PlanRequest

    request = PlanRequest(model=model, **dict(fixed))
    options = CalibrateOptions(no_rehearse=True)
    return _CalibrateArguments(model, request, options, as_json=False, md=False)


_TAKE = Planner.take


def _take(self: Any, plan: Any) -> None:
    """`Planner.take`: a plan that was kept is planned with."""
    _TAKE(self, plan)
    world().planned(plan)


class _Calendar(datetime):
    """``datetime`` on whose clock time stands."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls.fromtimestamp(1.8e9, tz)


def replacements(one: World) -> Iterator[tuple[str, Any]]:
    """What stands in whose place while it runs, by its import path."""
    place = "turbofit.launch.calibrate"
    nvml, threading = partial(SimulatedNvml, one.machine), CalibratorThreading()
    yield "turbofit.observe.sampler.Nvml", nvml
    yield "turbofit.observe.sampler.threading", threading
    yield f"{place}.calibrator.threading", threading
    # A card is looked at a hundred times a second in use.
    yield f"{place}.gpu_usage.Sampler", partial(Sampler, seconds=0.25)
    # All are of one day, so that plans with equal ones are equal.
    yield f"{place}.calibration_store.datetime", _Calendar
    yield "turbofit.launch.serve.planner.Planner.take", _take
    yield "turbofit.cli.commands.calibrate._show", lambda learned, _: one.calibrated(learned)
