"""A simulated machine: the holders of each card's bytes, ports, processes and a disk."""

from __future__ import annotations

import os
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from turbofit.core.errors import MachineError
from turbofit.core.machine import Holder, Machine
from turbofit.core.struct import NA
from turbofit.core.units import GIB
from turbofit.machine.nvml import GpuLostError
from turbofit.machine.source import machine_from

if TYPE_CHECKING:
    from bench.simulation.engine import SimulatedEngine

_RAM = 256 * GIB


class OutOfDeviceMemory(Exception):  # noqa: N818 - CUDA's word for it
    """An allocation was refused."""


@dataclass
class Card:
    uuid: str
    total: int
    reserved: int
    held: dict[int, int] = field(default_factory=dict)
    lost: bool = False

    @property
    def free(self) -> int:
        return self.total - self.reserved - sum(self.held.values())


class SimulatedNvml:
    """Replaces `turbofit.machine.nvml.Nvml`.

    Args:
        machine: the machine with the cards.
    """

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def __enter__(self) -> SimulatedNvml:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self, _: str, uuid: str) -> Any:
        """Return the handle of a card, or ``NA`` if NVML does not answer."""
        if self._machine.nvml_broken:
            return NA
        return next(card for card in self._machine.cards.values() if card.uuid == uuid)

    def memory(self, card: Card) -> tuple[Any, bool]:
        """Return the memory of a card, as NVML does.

        Raises:
            GpuLostError: the card fell off the bus.
        """
        if self._machine.nvml_broken:
            return NA, True
        if card.lost:
            raise GpuLostError("simulated")
        used = card.total - card.reserved - card.free
        return types.SimpleNamespace(total=card.total, used=used, free=card.free), True


class SimulatedMachine:
    """The state of the cards, the host, the ports and the disk.

    Args:
        spec: the cards, e.g. ``4xrtx3090``.
    """

    def __init__(self, spec: str) -> None:
        self._base = machine_from(spec)
        self.host = replace(
            self._base.host, ram_total=_RAM, ram_available=_RAM, shm_available=16 * GIB
        )
        self.cards = {}
        for gpu in self._base.gpus:
            assert isinstance(gpu.total, int)
            assert isinstance(gpu.reserved, int)
            self.cards[gpu.index] = Card(gpu.uuid, gpu.total, gpu.reserved)
        #: What was measured last, and what each card held then.
        self._measured: tuple[Any, Machine] | None = None
        self.names: dict[int, str] = {}
        self.engines: dict[int, SimulatedEngine] = {}
        #: Other programs that hold memory, each with its card and its begin.
        self.strangers: dict[int, tuple[int, float]] = {}
        #: Ports in use: by an engine, or by a stranger (None).
        self.ports: dict[int, SimulatedEngine | None] = {}
        self.nvml_broken = False
        self.host_kills = 0
        #: What a write to the disk meets: an errno, or seconds that it takes.
        self.disk_error: int | None = None
        self.disk_seconds = 0.0
        #: Whether the mount with the model's folder is away.
        self.checkpoint_away = False
        self.disk_bad_since = self.disk_bad_until = self.disk_slow_until = 0.0
        #: Seconds of the longest write until `disk_slow_until`.
        self.disk_slowest = 0.0

    def allocate(self, index: int, pid: int, size: int) -> None:
        """Take bytes of a card.

        Raises:
            OutOfDeviceMemory: the card has too little free memory.
        """
        card = self.cards[index]
        if card.lost or card.free < size:
            raise OutOfDeviceMemory(index)
        card.held[pid] = card.held.get(pid, 0) + size

    def release(self, pid: int, index: int | None = None) -> None:
        """Free the bytes that a process holds on one card or on all cards."""
        self.strangers.pop(pid, None)
        for at, card in self.cards.items():
            if index in (None, at):
                card.held.pop(pid, None)

    def measured(self) -> Machine:
        """Return the machine as `machine.nvml_machine.measure` would read it now.

        Raises:
            MachineError: the driver does not answer.
        """
        if self.nvml_broken:
            raise MachineError("NVML does not answer (simulated)", hint="wait")
        held = tuple((card.lost, *card.held.items()) for card in self.cards.values())
        if self._measured is not None and self._measured[0] == held:
            return self._measured[1]
        gpus = []
        for gpu in self._base.gpus:
            card = self.cards[gpu.index]
            if card.lost:
                continue
            holders = tuple(
                Holder(pid=pid, name=self.names.get(pid, "python"), bytes=size)
                for pid, size in card.held.items()
            )
            used = sum(card.held.values())
            gpus.append(replace(gpu, used=used, free=card.free, holders=holders))
        machine = replace(
            self._base, source="nvml", name="simulated", gpus=tuple(gpus), host=self.host,
            visible=tuple(gpu.index for gpu in gpus), links=self._base.links if len(gpus) ==
            len(self._base.gpus) else (),
        )  # fmt: skip
        self._measured = held, machine
        return machine

    def write_fault(self) -> None:
        """Fail if a write to the disk would fail now.

        Raises:
            OSError: the disk is full or broken.
        """
        if self.disk_error is not None:
            raise OSError(self.disk_error, os.strerror(self.disk_error))
