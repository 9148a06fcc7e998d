"""NVML where turbofit asks it for one card: the memory of the simulated machine's cards."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from turbofit.core.struct import NA
from turbofit.machine.nvml import GpuLostError

if TYPE_CHECKING:
    from bench.simulation.machine import Card, SimulatedMachine

__all__ = ["SimulatedNvml"]


class SimulatedNvml:
    """`turbofit.machine.nvml.Nvml`.

    Args:
        machine: whose cards there are.
    """

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def __enter__(self) -> SimulatedNvml:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self, _: str, uuid: str) -> Any:
        """The handle of a card."""
        if self._machine.nvml_broken:
            return NA
        return next(card for card in self._machine.cards.values() if card.uuid == uuid)

    def memory(self, card: Card) -> tuple[Any, bool]:
        """What is held of it.

        Raises:
            GpuLostError: it fell off the bus.
        """
        if self._machine.nvml_broken:
            return NA, True
        if card.lost:
            raise GpuLostError("simulated")
        used = card.total - card.reserved - card.free
        return types.SimpleNamespace(total=card.total, used=used, free=card.free), True
