"""Shows how far starting engines are, and compares a ready engine's figures with the forecast."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.plan import Plan
from turbofit.core.process.progress import Step, listening, now, tell
from turbofit.core.run_report import RunFigure
from turbofit.logs.death import Stage
from turbofit.serving.engine.supervised_engine import SupervisedEngine
from turbofit.serving.gpu_monitor import used_now

_DOING: Final[dict[Stage, str]] = {
    "starting": "starting the engine",
    "weights": "loading weights",
    "cache": "allocating the KV cache",
    "warm-up": "warming up",
    "serving": "waiting for the first answer",
    "check": "answering worst-case requests",
}
#: Seconds between two readings of the GPUs.
_EVERY: Final = 1.0


class StartProgress:
    """Shows the phase of the slowest engines of a plan, until all engines are ready.

    ``before``: bytes in use on each GPU before the launch.
    """

    def __init__(
        self, plan: Plan, before: Mapping[int, int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._before, self._clock = plan, before, clock
        #: The time of the last reading of the GPUs, and the bytes of weights by this reading.
        self._looked, self._loaded = float("-inf"), 0
        #: Whether the progress of the start is shown now.
        self._shown = False
        #: The words for each phase.
        self.doing = dict(_DOING)
        #: The forecast seconds of the check, and the time of its beginning; 0 if unknown.
        self.check_seconds = self._check_began = 0.0
        #: The step that was shown before the engines started.
        self._around: Step | None = None

    def look(self, engines: Sequence[SupervisedEngine], *, examined: bool = False) -> None:
        """Show the phase of the starting engines.

        ``examined``: an examiner shows its own requests, so the check is not shown here.
        """
        if not listening():
            return
        starting = [engine for engine in engines if engine.state == "starting"]
        if not starting:
            if self._shown:
                self._shown = False
                tell(self._around)
            return
        if not self._shown:
            self._shown, self._around = True, now()
        phases = list(self.doing)
        phase = min((engine.tracker.phase for engine in starting), key=phases.index)
        if examined and phase in ("serving", "check"):
            return
        here = [engine for engine in starting if engine.tracker.phase == phase]
        tell(self._step(phase, here, engines))

    def _step(
        self,
        phase: Stage,
        here: Sequence[SupervisedEngine],
        engines: Sequence[SupervisedEngine],
    ) -> Step:
        """Return the progress of the engines ``here`` in this phase."""
        doing = self.doing[phase]
        detail = f"{len(here)} of {len(engines)} engines" if len(engines) > 1 else ""
        if phase == "weights":
            return Step(doing, *self._weights(engines), "bytes", detail)
        if phase == "check" and self.check_seconds:
            self._check_began = self._check_began or self._clock()
            done = self._clock() - self._check_began
            return Step(doing, done, self.check_seconds, "s", detail)
        if phase == "warm-up" and here[0].tracker.warming is not None:
            tokens = f"{here[0].tracker.warming:,} tokens"
            detail = f"{tokens}, {detail}" if detail else tokens
        return Step(doing, detail=detail)

    def _weights(self, engines: Sequence[SupervisedEngine]) -> tuple[int, int]:
        """Return the bytes of weights on the GPUs now, and the bytes of all weights.

        The first number is derived from the memory in use. A growing process or a CUDA context
        above the forecast makes the number too large; weights in host memory make it too small.
        """
        moment = self._clock()
        if moment - self._looked >= _EVERY:
            self._looked, used = moment, self.used(engines)
            self._loaded = 0
            for card in self._plan.ledgers:
                # The bytes in use with an engine that has loaded no weights yet.
                empty = self._before.get(card.index, card.used) + card.bytes_in("context")
                loaded = max(used.get(card.index, 0) - empty, 0)
                self._loaded += min(loaded, card.bytes_in("weights"))
        return self._loaded, sum(card.bytes_in("weights") for card in self._plan.ledgers)

    def used(self, engines: Sequence[SupervisedEngine]) -> dict[int, int]:
        """Return bytes in use on each GPU, real or pretend; empty if no GPU can be read."""
        readers = [engine.pretended for engine in engines if engine.pretended is not None]
        if not readers:
            return used_now(self._plan)
        return {usage.gpu: usage.in_use for reader in readers for usage in reader.usages()}


def compared_figures(
    plan: Plan, engine: SupervisedEngine, in_use: Mapping[int, int]
) -> list[RunFigure]:
    """Return figures of a ready engine, each with the plan's forecast.

    ``in_use``: bytes in use on each real GPU, by index.
    """
    rows = list(engine.tracker.figures)
    if engine.pretended is not None:
        forecasts = {ledger.index: ledger.most for ledger in plan.ledgers}
        for usage in engine.pretended.usages():
            what, gpu = "in use at most", usage.gpu
            rows.append(RunFigure(what=what, forecast=forecasts[gpu], actual=usage.peak, gpu=gpu))
        return rows
    for ledger in engine.planned.ledgers:
        if (used := in_use.get(ledger.index)) is not None:
            # The executor's pool never shrinks, so the use after the check is the peak.
            what, gpu = "in use after the check", ledger.index
            rows.append(RunFigure(what=what, forecast=ledger.peak, actual=used, gpu=gpu))
    return rows


def with_real_caches(plan: Plan, cached: Mapping[int, int | None]) -> Plan:
    """Return the plan with the KV tokens of its engines' real caches, if these have fewer tokens.

    The gateway lets requests reserve no more tokens than the returned plan has. After a restart, an
    engine's cache may be smaller still. ``cached``: tokens by group, None if an engine's log does
    not show the number.
    """
    engines = []
    for number, engine in enumerate(plan.engines):
        tokens = cached.get(number)
        fewest = engine.kv.tokens if tokens is None else min(engine.kv.tokens, tokens)
        engines.append(replace(engine, kv=replace(engine.kv, tokens=fewest)))
    return replace(plan, engines=tuple(engines))
