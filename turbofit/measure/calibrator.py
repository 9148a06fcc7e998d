"""Examines an engine for a calibration: sends all worst cases, reads memory and times steps.

Memory is read after the warm-up, after one small request of each kind (it loads kernels) and after
each worst case.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from turbofit.core.errors import LaunchError, TurbofitError, UsageError
from turbofit.core.machine import MeasuredSteps
from turbofit.core.plan import Plan
from turbofit.core.process.progress import Step, tell
from turbofit.core.units import format_bytes
from turbofit.measure.calibrate_steps import EngineAddress, StepTimer
from turbofit.measure.memory_usage import GpuUsage
from turbofit.serving.calibration import KERNELS, STEADY, CalibratedGpu, Observation
from turbofit.serving.engine.supervised_engine import SupervisedEngine
from turbofit.serving.engine.worst_requests import (
    ProbeRequest,
    other_worst_requests,
    small_requests,
    worst_image_tokens,
    worst_request,
)

_REQUEST: Final = "vision_request"


class Calibrator:
    """The `Examiner` of a calibration: sends all worst cases, and reads the memory after each case.

    `begin` drops the observations of an earlier plan.
    """

    def __init__(self, usage_of: Callable[[Plan], GpuUsage], say: Callable[[str], None]) -> None:
        self._usage_of, self._say = usage_of, say
        self.usage: GpuUsage | None = None
        self._observations: dict[int, Observation] = {}
        #: One engine at a time is timed, and only one engine for each kind of cards.
        self._timing, self._timed = threading.Lock(), set[tuple[str, ...]]()

    @property
    def observations(self) -> tuple[Observation, ...]:
        """Observations of the engines that were measured completely, by group."""
        return tuple(self._observations[group] for group in sorted(self._observations))

    @property
    def complete(self) -> bool:
        """Whether every group of the plan was measured completely."""
        groups = None if self.usage is None else len(self.usage.plan.groups)
        return len(self._observations) == groups

    def begin(self, plan: Plan) -> None:
        self.end()
        self.usage, self._observations = self._usage_of(plan), {}
        self._timed.clear()

    def end(self) -> None:
        if self.usage is not None:
            self.usage.end()

    def examine(
        self, engine: SupervisedEngine, model: str, ask: Callable[[ProbeRequest], int]
    ) -> None:
        """Measure an engine that is up; its observation replaces an earlier one of its group."""
        usage, observations = self.usage, self._observations  # `begin` may replace them meanwhile
        assert usage is not None
        observations.pop(engine.group, None)  # an engine that starts again is measured again
        try:
            observations[engine.group] = self._observe(usage, engine, model, ask)
        except LaunchError:
            raise
        except TurbofitError as exc:
            raise LaunchError(exc.message, hint=exc.hint) from None

    def _observe(
        self, usage: GpuUsage, engine: SupervisedEngine, model: str,
        ask: Callable[[ProbeRequest], int],
    ) -> Observation:  # fmt: skip
        """Send an engine small requests and all worst cases; note the memory after each."""
        plan = usage.plan
        used: dict[int, dict[str, int]] = {}

        def take(name: str) -> None:
            """Note the bytes in use on the engine's GPUs under ``name``."""
            sizes: dict[int, int] = {}
            for index, span in usage.read(engine).items():
                # The memory that stays in use after a worst case also counts, since pools keep
                # their largest size.
                sizes[index] = span.last if name in (STEADY, KERNELS) else max(span)
                used.setdefault(index, {})[name] = sizes[index]
            most = max(sizes, key=lambda index: sizes[index])
            self._say(f"{engine.name}: {name}: GPU {most} has {format_bytes(sizes[most])} in use")

        def drive(question: ProbeRequest, name: str) -> int:
            """Send a worst case and note the memory; return the tokens of the prompt."""
            tell(Step(f"{engine.name}: measuring {name}"))
            tokens = ask(question)
            take(name)
            return tokens

        tell(Step(f"{engine.name}: measuring"))
        take(STEADY)
        for small in small_requests(plan, model):
            ask(small)
        take(KERNELS)
        text, worst = 0, worst_request(plan, model)
        if worst is not None:
            text = max(0, drive(worst, _REQUEST) - worst_image_tokens(plan))
        for question in other_worst_requests(plan, engine.planned, model, text):
            drive(question, question.name)
        budget = engine.tracker.budget
        free, region = (None, None) if budget is None else (budget.free, budget.budget)
        cards = tuple(
            CalibratedGpu(index=index, before=usage.before[index], used=sizes)
            for index, sizes in used.items()
        )
        steps = self._steps(plan, engine, model)
        return Observation(group=engine.group, free=free, region=region, cards=cards, steps=steps)

    def _steps(self, plan: Plan, engine: SupervisedEngine, model: str) -> MeasuredSteps | None:
        """Return the timed forwards of an engine.

        None if an engine on cards of the same names was timed before. None also on pretend GPUs
        without a clock, where a forward takes no time.
        """
        names = tuple(sorted(gpu.name for gpu in engine.planned.ledgers))
        with self._timing:
            if names in self._timed or (engine.pretended is not None and engine.clock is None):
                return None
            self._timed.add(names)
            address = EngineAddress(engine.url, model, engine.client.key)
            try:
                return StepTimer(plan, engine.planned, address, engine.clock).measure(
                    lambda what: tell(Step(f"{engine.name}: timing {what}"))
                )
            except UsageError as exc:
                self._say(f"warning: no step is kept: {exc.message}")
                return None
