"""How far engines are that start, told while they do: their phase, and the weights on the GPUs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from turbofit.core.process.progress import Step, listening, now, tell
from turbofit.launch.serve.gpu_monitor import used_now

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.plan import GpuLedger, Phase, Plan
    from turbofit.launch.engine.pretended import PretendReaders
    from turbofit.launch.engine.startup_tracker import EnginePhase
    from turbofit.launch.engine.supervised_engine import SupervisedEngine

__all__ = ["StartProgress"]

_DOING: Final[dict[EnginePhase, str]] = {
    "starting": "starting the engine",
    "weights": "loading weights",
    "cache": "allocating the KV cache",
    "warm-up": "warming up",
    "serving": "waiting for the first answer",
    "check": "answering worst-case requests",
}
#: Seconds between two looks at the GPUs.
_EVERY: Final = 1.0


class StartProgress:
    """Tells what the slowest engines of a plan do, until all are ready.

    ``before`` are bytes in use on each GPU before the launch; pretend GPUs hold what their
    timelines say.
    """

    def __init__(
        self,
        plan: Plan,
        before: Mapping[int, int],
        *,
        pretend: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._before, self._pretend, self._clock = plan, before, pretend, clock
        self._looked, self._loaded = float("-inf"), 0
        self._told = False
        #: What was going on when the engines were started.
        self._around: Step | None = None
        self._readers: PretendReaders | None = None

    def look(self, engines: Sequence[SupervisedEngine], *, examined: bool = False) -> None:
        """Tell what all engines of the plan do now.

        ``examined``: an examiner tells what is asked of an engine that serves.
        """
        if not listening():
            return
        starting = [one for one in engines if one.state == "starting"]
        if not starting:
            if self._told:
                self._told = False
                tell(self._around)
            return
        if not self._told:
            self._told, self._around = True, now()
        phases = list(_DOING)
        phase = min((one.tracker.phase for one in starting), key=phases.index)
        if examined and phase in ("serving", "check"):
            last = now()
            if last is None or last.doing in _DOING.values():
                tell(Step("measuring"))
            return
        here = [one for one in starting if one.tracker.phase == phase]
        detail = f"{len(here)} of {len(engines)} engines" if len(engines) > 1 else ""
        if phase == "weights":
            tell(Step(_DOING[phase], *self._weights(engines), "bytes", detail))
            return
        if phase == "warm-up" and here[0].tracker.warming is not None:
            detail = f"{here[0].tracker.warming:,} tokens{', ' * bool(detail)}{detail}"
        tell(Step(_DOING[phase], detail=detail))

    def _weights(self, engines: Sequence[SupervisedEngine]) -> tuple[int, int]:
        """Bytes of weights on the GPUs, and those that there will be.

        Over where a neighbour grows meanwhile, or the CUDA context is larger than the plan's; under
        while what was read is in host memory.
        """
        moment = self._clock()
        if moment - self._looked >= _EVERY:
            self._looked, used = moment, self._used(engines)
            self._loaded = sum(
                min(max(used.get(one.index, 0) - self._empty(one), 0), _bytes(one, "weights"))
                for one in self._plan.gpus
            )
        return self._loaded, sum(_bytes(one, "weights") for one in self._plan.gpus)

    def _empty(self, card: GpuLedger) -> int:
        """What a GPU has in use with an engine on it that has loaded nothing."""
        return self._before.get(card.index, card.used) + _bytes(card, "context")

    def _used(self, engines: Sequence[SupervisedEngine]) -> dict[int, int]:
        """Bytes in use on each GPU."""
        if not self._pretend:
            return used_now(self._plan)
        if self._readers is None:
            from turbofit.launch.engine.pretended import PretendReaders

            self._readers = PretendReaders(self._plan)
        readers = self._readers
        every = [seen for one in engines for seen in readers.seen(one.group, one.timeline)]
        return {seen.gpu: seen.held for seen in every}


def _bytes(card: GpuLedger, phase: Phase) -> int:
    return sum(term.bytes for term in card.ledger if term.phase == phase)
