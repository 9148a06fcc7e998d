"""Drives engines through everything that their plan pays for, and reads their GPUs after each step.

Steps: after the warm-up; one small request of each kind, for kernels; then each worst case. What a
step showed is kept at once, so that a run that was cut short goes on after it.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.core.process.progress import Step, tell
from turbofit.core.units import format_bytes
from turbofit.launch.calibrate.gpu_usage import engine_ended
from turbofit.launch.engine.worst_requests import (
    every_worst,
    small_requests,
    worst_image_tokens,
    worst_request,
)
from turbofit.observe.calibration import KERNELS, STEADY, CalibratedGpu, Observation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turbofit.core.plan import Plan
    from turbofit.launch.calibrate.gpu_usage import GpuUsageReader
    from turbofit.launch.calibrate.progress import Progress
    from turbofit.launch.engine.supervised_engine import SupervisedEngine
    from turbofit.launch.engine.worst_requests import ProbeRequest

__all__ = ["Calibrator"]

_REQUEST = "vision_request"


class Calibrator:
    """An examiner of engines.

    Args:
        usage: reads the GPUs.
        progress: what earlier runs have shown already.
        say: takes lines of progress.
    """

    def __init__(
        self, usage: GpuUsageReader, progress: Progress, say: Callable[[str], None]
    ) -> None:
        self._usage, self._progress, self._say = usage, progress, say
        #: Bytes in use on each GPU before the last start.
        self.before: dict[int, int] = {}
        self._plan: Plan | None = None
        self._lock = threading.Lock()

    @property
    def plan(self) -> Plan:
        """The one that was launched last."""
        assert self._plan is not None
        return self._plan

    def begin(self, plan: Plan) -> None:
        """See :class:`turbofit.launch.engine.supervised_engine.Examiner`."""
        with self._lock:
            self._plan = plan
            self.before = self._usage.begin(plan)
            self._progress.begin(plan, self.before)

    def end(self) -> None:
        """No GPU is read any more."""
        self._usage.end()

    def examine(
        self, engine: SupervisedEngine, model: str, ask: Callable[[ProbeRequest], int]
    ) -> None:
        """See :class:`turbofit.launch.engine.supervised_engine.Examiner`."""
        try:
            self._examine(self.plan, engine, model, ask)
        except LaunchError:
            raise
        except TurbofitError as exc:  # a GPU, or an engine of an earlier plan, cannot be read
            raise LaunchError(exc.message, hint=exc.hint) from None

    def _examine(
        self, launched: Plan, engine: SupervisedEngine, model: str,
        ask: Callable[[ProbeRequest], int],
    ) -> None:  # fmt: skip
        plan = launched.of_group(engine.group)
        self._take(launched, engine, STEADY)
        for small in small_requests(plan, model):
            ask(small)
        self._take(launched, engine, KERNELS)
        worst = worst_request(plan, model)
        if worst is not None:
            tokens = self._drive(launched, engine, _REQUEST, worst, ask)
            if tokens is not None:
                text = max(0, tokens - worst_image_tokens(plan))
                with self._progress_of(launched, engine) as progress:
                    progress.texts[engine.group] = text
        text = self._progress.texts.get(engine.group, 0)
        for question in every_worst(plan, model, text):
            self._drive(launched, engine, question.name, question, ask)
        with self._progress_of(launched, engine) as progress:
            progress.finish(engine.group)

    @contextmanager
    def _progress_of(self, launched: Plan, engine: SupervisedEngine) -> Iterator[Progress]:
        """What was read so far, while this plan is the launched one.

        Raises:
            MachineError: it is not any more, and the engine has ended.
        """
        with self._lock:
            if self._plan is not launched:
                raise engine_ended(engine)
            yield self._progress

    def _drive(
        self,
        launched: Plan,
        engine: SupervisedEngine,
        name: str,
        question: ProbeRequest,
        ask: Callable[[ProbeRequest], int],
    ) -> int | None:
        """Ask and read; None where that was done before."""
        if self._progress.has(engine.group, name):
            self._say(f"{engine.name}: {name}: measured before")
            return None
        tell(Step(f"{engine.name}: measuring {name}"))
        tokens = ask(question)
        self._take(launched, engine, name)
        return tokens

    def _take(self, launched: Plan, engine: SupervisedEngine, name: str) -> None:
        """Read, and keep it. What was in use after a step belongs to it too: pools keep their most.

        What the engine's log says of its cache comes with the first step that finds it: the reader
        of the log may be late.
        """
        spans = self._usage.read(launched, engine)
        steady = name in (STEADY, KERNELS)
        used = {i: span.last if steady else max(span) for i, span in spans.items()}
        budget = engine.tracker.budget
        free, region = (None, None) if budget is None else (budget.free, budget.budget)
        with self._progress_of(launched, engine) as progress:
            cards = tuple(
                CalibratedGpu(index=i, before=self.before[i], used={name: used[i]}) for i in used
            )
            progress.add(Observation(group=engine.group, free=free, region=region, cards=cards))
        most = max(used, key=lambda i: used[i])
        self._say(f"{engine.name}: {name}: GPU {most} has {format_bytes(used[most])} in use")
