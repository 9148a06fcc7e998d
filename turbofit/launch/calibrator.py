"""The examiner of a calibration: it drives engines through all that their plan pays for.

It reads the GPUs after each step: after the warm-up; after one small request of each kind, for
kernels; after each worst case.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError, MachineError, TurbofitError
from turbofit.core.process.progress import Step, tell
from turbofit.core.units import format_bytes
from turbofit.launch.engine.worst_requests import (
    every_worst,
    small_requests,
    worst_image_tokens,
    worst_request,
)
from turbofit.observe.calibration import KERNELS, STEADY, CalibratedGpu, Observation
from turbofit.observe.sampler import SampledRange, Sampler, memory_now

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.plan import Plan
    from turbofit.launch.engine.supervised_engine import SupervisedEngine
    from turbofit.launch.engine.worst_requests import ProbeRequest

_REQUEST: Final = "vision_request"
#: Seconds that a card is sampled before a reading counts as its last.
_SETTLE: Final = 0.3


class NvmlUsageReader:
    """What the GPUs of a plan hold, in bytes of the whole card, everybody's.

    ``before`` are those in use before the engines start, by the machine's index.

    Raises:
        MachineError: one cannot be read.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self._uuids = plan, {gpu.index: gpu.uuid for gpu in plan.gpus}
        self.before = {index: memory_now(uuid).used for index, uuid in self._uuids.items()}
        self._sampler = Sampler(list(self._uuids.values()))
        self._sampler.__enter__()
        self._since = dict.fromkeys(self._uuids, time.monotonic())

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """The most since the last reading of this engine, and now.

        Raises:
            MachineError: what a GPU held after its last answer is not known.
        """
        time.sleep(_SETTLE)
        now, spans = time.monotonic(), {}
        for index in self.plan.parallel.groups[engine.group]:
            uuid = self._uuids[index]
            span = self._sampler.between(uuid, self._since[index], now)
            if span is None or self._sampler.between(uuid, now - _SETTLE, now) is None:
                raise MachineError(
                    f"GPU {index} did not answer NVML", hint="turbofit doctor says more"
                )
            spans[index], self._since[index] = span, now
        return spans

    def end(self) -> None:
        self._sampler.__exit__()


class PretendUsageReader:
    """What pretend GPUs hold, by their timeline. A peak is told where it is the highest yet."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.before = {gpu.index: gpu.used for gpu in plan.gpus}
        self._highest: dict[int, int] = {}

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """What each pretend GPU holds now.

        Raises:
            MachineError: the account of the pretend GPUs cannot be read.
        """
        spans = {}
        for usage in engine.pretended.usages() if engine.pretended is not None else ():
            # Before the first reading the peak is that of loading.
            new, used = usage.peak > self._highest.get(usage.gpu, usage.peak), usage.in_use
            spans[usage.gpu] = SampledRange(peak=usage.peak if new else used, last=used)
            self._highest[usage.gpu] = usage.peak
        if not spans:
            raise MachineError("the pretend GPUs' account cannot be read", hint="see the log")
        return spans

    def end(self) -> None:
        """See `NvmlUsageReader`."""


if TYPE_CHECKING:
    GpuUsage = NvmlUsageReader | PretendUsageReader


class Calibrator:
    """The `Examiner` of a calibration; what engines of an earlier plan show counts for nothing."""

    def __init__(self, usage_of: Callable[[Plan], GpuUsage], say: Callable[[str], None]) -> None:
        self._usage_of, self._say = usage_of, say
        self.usage: GpuUsage | None = None
        self._observations: dict[int, Observation] = {}

    @property
    def observations(self) -> tuple[Observation, ...]:
        """What was read of engines that have shown everything, by group."""
        return tuple(self._observations[group] for group in sorted(self._observations))

    @property
    def complete(self) -> bool:
        """Whether every group of the plan has shown everything."""
        groups = None if self.usage is None else len(self.usage.plan.parallel.groups)
        return len(self._observations) == groups

    def begin(self, plan: Plan) -> None:
        self.end()
        self.usage, self._observations = self._usage_of(plan), {}

    def end(self) -> None:
        if self.usage is not None:
            self.usage.end()

    def examine(
        self, engine: SupervisedEngine, model: str, ask: Callable[[ProbeRequest], int]
    ) -> None:
        usage, observations = self.usage, self._observations  # of the engine's own plan
        assert usage is not None
        observations.pop(engine.group, None)  # an engine that starts again shows all again
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
        plan = usage.plan.of_group(engine.group)
        used: dict[int, dict[str, int]] = {}

        def take(name: str) -> None:
            sizes: dict[int, int] = {}
            for index, span in usage.read(engine).items():
                # What is in use after a worst case belongs to it, too: pools keep their most.
                sizes[index] = span.last if name in (STEADY, KERNELS) else max(span)
                used.setdefault(index, {})[name] = sizes[index]
            most = max(sizes, key=lambda index: sizes[index])
            self._say(f"{engine.name}: {name}: GPU {most} has {format_bytes(sizes[most])} in use")

        def drive(question: ProbeRequest, name: str) -> int:
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
        for question in every_worst(plan, model, text):
            drive(question, question.name)
        budget = engine.tracker.budget
        free, region = (None, None) if budget is None else (budget.free, budget.budget)
        cards = tuple(
            CalibratedGpu(index=index, before=usage.before[index], used=sizes)
            for index, sizes in used.items()
        )
        return Observation(group=engine.group, free=free, region=region, cards=cards)
