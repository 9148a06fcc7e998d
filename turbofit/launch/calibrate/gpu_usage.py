"""What each GPU of a plan holds while engines run: by NVML, or by the account of pretend cards.

A reading is in bytes of the whole card, everybody's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from turbofit.core.errors import MachineError
from turbofit.observe.sampler import SampledRange, Sampler, memory_now

if TYPE_CHECKING:
    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.launch.engine.pretended import PretendReaders
    from turbofit.launch.engine.supervised_engine import SupervisedEngine

__all__ = ["GpuUsageReader", "NvmlUsageReader", "PretendUsageReader", "engine_ended"]

#: Seconds that a card is sampled before a reading counts as its last.
_SETTLE: Final = 0.3


class GpuUsageReader(Protocol):
    """Reads the GPUs of one engine."""

    def begin(self, plan: Plan) -> dict[int, int]:
        """Before the engines are started: used bytes by the machine's index."""

    def read(self, plan: Plan, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """The most since the last reading of this engine, which is of this plan, and now."""

    def end(self) -> None:
        """No more is asked."""


class NvmlUsageReader:
    """Of real GPUs."""

    def __init__(self) -> None:
        self._sampler: Sampler | None = None
        self._since: dict[int, float] = {}
        self._cards: dict[int, GpuLedger] = {}
        self._plan: Plan | None = None

    def begin(self, plan: Plan) -> dict[int, int]:
        """See :class:`GpuUsageReader`.

        Raises:
            MachineError: a GPU cannot be read.
        """
        self.end()
        self._plan, self._cards = plan, {one.index: one for one in plan.gpus}
        before = {index: memory_now(one.uuid).used for index, one in self._cards.items()}
        self._sampler = Sampler([one.uuid for one in plan.gpus])
        self._sampler.__enter__()
        self._since = dict.fromkeys(self._cards, time.monotonic())
        return before

    def read(self, plan: Plan, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """See :class:`GpuUsageReader`.

        Raises:
            MachineError: a GPU did not answer, or no more: what it held later is not known. Or
                another plan is launched by now, and the engine has ended.
        """
        time.sleep(_SETTLE)
        now, found = time.monotonic(), {}
        if self._plan is not plan or self._sampler is None:
            raise engine_ended(engine)
        for index in plan.parallel.groups[engine.group]:
            uuid = self._cards[index].uuid
            span = self._sampler.between(uuid, self._since[index], now)
            if span is None or self._sampler.between(uuid, now - _SETTLE, now) is None:
                raise MachineError(
                    f"GPU {index} did not answer NVML", hint="turbofit doctor says more"
                )
            found[index], self._since[index] = span, now
        return found

    def end(self) -> None:
        """See :class:`GpuUsageReader`."""
        self._plan = None
        if self._sampler is not None:
            self._sampler.__exit__()
            self._sampler = None


class PretendUsageReader:
    """Of pretend ones, from their timeline. A peak is told where it is the highest so far."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._highest: dict[int, int] = {}
        self._readers: PretendReaders | None = None

    def begin(self, plan: Plan) -> dict[int, int]:
        """See :class:`GpuUsageReader`: only what the plan says that others hold."""
        from turbofit.launch.engine.pretended import PretendReaders

        self._plan, self._highest, self._readers = plan, {}, PretendReaders(plan)
        return {one.index: one.used for one in plan.gpus}

    def read(self, plan: Plan, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """See :class:`GpuUsageReader`.

        Raises:
            MachineError: its account cannot be read. Or another plan is launched by now, and the
                engine has ended.
        """
        if self._plan is not plan or self._readers is None:
            raise engine_ended(engine)
        found = {}
        for seen in self._readers.seen(engine.group, engine.timeline):
            first = seen.gpu not in self._highest
            new = not first and seen.peak > self._highest[seen.gpu]
            # Before the first reading the peak is that of loading.
            found[seen.gpu] = SampledRange(peak=seen.peak if new else seen.held, last=seen.held)
            self._highest[seen.gpu] = seen.peak
        if not found:
            raise MachineError("the pretend GPUs' account cannot be read", hint="see the log")
        return found

    def end(self) -> None:
        """See :class:`GpuUsageReader`."""
        self._plan = None


def engine_ended(engine: SupervisedEngine) -> MachineError:
    """What is raised for an engine whose plan is not the launched one any more."""
    return MachineError(f"{engine.name} has ended: another plan is launched", hint="see the log")
