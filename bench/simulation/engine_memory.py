"""What a simulated engine takes of its cards, phase by phase, as the plan's ledger says."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING

from turbofit.memory.calibrated import BUFFERS, CONTEXT

if TYPE_CHECKING:
    from bench.simulation.engine import SimulatedEngine
    from turbofit.core.plan import GpuLedger

__all__ = ["EngineMemory"]

#: Of the pool, which is taken by itself, and what a calibration only says of the other terms.
_NOT = ("pool_warmup", CONTEXT, BUFFERS)


class EngineMemory:
    """The bytes of one engine.

    Args:
        engine: whose they are.
    """

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine, self._machine = engine, engine.world.machine
        #: By card, the most that the executor's pool ever took, and what only loading takes.
        self._pools = dict.fromkeys(engine.gpus, 0)
        self._extra: dict[int, int] = {}

    def _ledger(self, index: int) -> GpuLedger:
        return next(gpu for gpu in self._engine.plan.gpus if gpu.index == index)

    def take(self, phase: str, also: Mapping[int, int] | None = None) -> None:
        """Allocate what the ledger has for a phase, and what loading takes for a while."""
        for index in self._engine.gpus:
            terms = self._ledger(index).ledger
            size = sum(one.bytes for one in terms if one.phase == phase and one.term not in _NOT)
            if phase == "weights" and self._engine.fault.more_at == "weights":
                size += self._engine.fault.more
            if size < 0:
                continue
            self._machine.allocate(index, self._engine.pid, size)
        if phase == "buffers":
            for index in self._engine.gpus:
                warm = [t.bytes for t in self._ledger(index).ledger if t.term == "pool_warmup"]
                self._pool(index, sum(warm))
        for index, size in (also or {}).items():
            self._machine.allocate(index, self._engine.pid, size)

    def loading(self) -> dict[int, int]:
        """Bytes beside the weights while they load."""
        self._extra = {}
        for index in self._engine.gpus:
            gpu = self._ledger(index)
            there = sum(t.bytes for t in gpu.ledger if t.phase in ("before", "context", "weights"))
            self._extra[index] = max(0, gpu.load_peak - there)
        return self._extra

    def give_loading(self) -> None:
        for index, size in self._extra.items():
            self._machine.allocate(index, self._engine.pid, -size)

    def _pool(self, index: int, need: int) -> None:
        """The executor's pool keeps its high-water mark."""
        if need > self._pools[index]:
            self._machine.allocate(index, self._engine.pid, need - self._pools[index])
            self._pools[index] = need

    def work(self, units: int) -> None:
        """Take what a request needs of the pool.

        Raises:
            OutOfDeviceMemory: it is not there.
        """
        most = (
            self._engine.plan.limits.units_per_forward
            or self._engine.plan.limits.units_per_request
            or 1
        )
        for index in self._engine.gpus:
            gpu = self._ledger(index)
            warm = next((t.bytes for t in gpu.ledger if t.term == "pool_warmup"), 0)
            # peak is the pool at its fullest; three eighths of it for a text.
            whole = max(0, gpu.peak - gpu.steady) + warm
            # In eighths, as a pool grows by blocks: fewer machines that differ by a few bytes.
            part = min(1.0, ceil(8 * units / most) / 8) if units else 0.375
            need = int(whole * part)
            if self._engine.fault.more_at == "serving" and units:
                need += self._engine.fault.more
            self._pool(index, need)
