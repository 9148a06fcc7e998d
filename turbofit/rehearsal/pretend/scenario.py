"""Describes a pretend machine, and writes the description for the libraries in C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from pathlib import Path
from typing import Any

from turbofit.core.errors import MachineError
from turbofit.core.machine import Gpu, Machine
from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.libraries import PretendError

# Shared memory in KiB of one multiprocessor, and the most that one block can use, by compute
# capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_SHARED_KIB = {
    (7, 0): (96, 96),
    (7, 2): (96, 96),
    (7, 5): (64, 64),
    (8, 0): (164, 163),
    (8, 6): (100, 99),
    (8, 7): (164, 163),
    (8, 9): (100, 99),
    (9, 0): (228, 227),
    (10, 0): (228, 227),
    (10, 3): (228, 227),
    (12, 0): (100, 99),
    (12, 1): (100, 99),
}


@dataclass(frozen=True)
class PretendGpu:
    """One pretend card.

    Attributes:
        total: bytes that CUDA calls total memory.
        used: bytes that are in use before any process starts.
        late: bytes that become used once a process has read free memory, such as kernel modules.
        sm: compute capability.
        sm_count: number of multiprocessors.
        l2: bytes of L2 cache (the engine's tuner allocates a buffer of this size).
        reserved: bytes that the driver keeps in addition to ``total``; only NVML shows them.
    """

    name: str
    total: int
    used: int = 0
    late: int = 0
    sm: tuple[int, int] = (8, 6)
    sm_count: int = 82
    l2: int = 6 * MIB
    reserved: int = 0

    def shared_memory(self) -> tuple[int, int]:
        """Return the bytes of shared memory per multiprocessor, and the most bytes for one block.

        Raises:
            PretendError: this compute capability is unknown.
        """
        if self.sm not in _SHARED_KIB:
            known = ", ".join(f"{a}.{b}" for a, b in sorted(_SHARED_KIB))
            raise PretendError(
                f"compute capability {self.sm[0]}.{self.sm[1]} is not known to the pretend machine",
                hint=f"the pretend machine knows {known}",
            )
        multiprocessor, block = _SHARED_KIB[self.sm]
        return multiprocessor * 1024, block * 1024


@dataclass(frozen=True)
class Scenario:
    """A pretend machine and the settings of its account.

    Attributes:
        gpus: the cards, in CUDA's order.
        peers: pairs (from, to) of cards: ``from`` reaches the memory of ``to``. None: all pairs.
        pool_step: bytes by which a stream-ordered pool grows (32 MiB, as on an H200).
        pinned_limit: the most bytes of page-locked host memory; None is no limit.
        timeline_limit: the most bytes of a timeline, the file of a process's allocations.
        fail_at: the number, from 1, of the device allocation that fails as if its card were full.
            All processes of the machine share one count. None: no allocation fails.
        fail_pinned_at: the number of the page-locked allocation of host memory that fails.
        context: bytes of the CUDA context that each process takes on each card that it uses.
    """

    gpus: tuple[PretendGpu, ...]
    peers: frozenset[tuple[int, int]] | None = None
    pool_step: int = 32 * MIB
    pinned_limit: int | None = None
    timeline_limit: int = 256 * MIB
    context: int = 0
    fail_at: int | None = None
    fail_pinned_at: int | None = None

    def text(self, timeline: str, shared: str = "") -> str:
        """Return the content of the scenario file, which the libraries in C read.

        ``timeline`` is the path of a file; if the path ends with ``/``, it is a folder with a file
        for each process. ``shared`` is the path of the file through which processes share the
        machine. With an empty path each process has a machine of its own.
        """
        lines = [f"timeline {timeline}"]
        lines += [f"shared {shared}"] if shared else []
        for gpu in self.gpus:
            multiprocessor, block = gpu.shared_memory()
            lines.append(
                f"device {gpu.total} {gpu.used} {gpu.late} {gpu.sm[0]} {gpu.sm[1]} "
                f"{gpu.sm_count} {gpu.l2} {multiprocessor} {block} {' '.join(gpu.name.split())}"
            )
        for index, gpu in enumerate(self.gpus):
            lines += [f"reserved {index} {gpu.reserved}"] if gpu.reserved else []
        peers = permutations(range(len(self.gpus)), 2) if self.peers is None else self.peers
        lines += [f"peer {a} {b}" for a, b in sorted(peers)]
        knobs = {field.name: getattr(self, field.name) for field in fields(self)}
        del knobs["gpus"], knobs["peers"]
        lines += [f"{name} {value}" for name, value in knobs.items() if value is not None]
        return "\n".join(lines) + "\n"


def write_scenario(path: Path, scenario: Scenario, timeline: str, shared: str = "") -> None:
    """Write the file that the libraries in C read; see `Scenario.text`."""
    path.write_text(scenario.text(timeline, shared), encoding="utf-8")


def pretend_twin(machine: Machine, indices: Sequence[int]) -> Scenario:
    """Return a pretend machine with copies of the GPUs at ``indices``, in this order.

    The memory that is in use on a GPU becomes ``used`` of its copy.
    """
    place = {index: position for position, index in enumerate(indices)}
    links = [link for link in machine.links if link.peers and {link.a, link.b} <= place.keys()]
    pairs = {(place[link.a], place[link.b]) for link in links}
    return Scenario(
        gpus=tuple(_gpu(machine.gpu(index)) for index in indices),
        peers=frozenset(pairs | {(b, a) for a, b in pairs}),
    )


def _gpu(gpu: Gpu) -> PretendGpu:
    """Return the pretend copy of a GPU.

    Raises:
        MachineError: a value that the copy needs is unknown.
    """
    total, capability = _known(gpu, "total"), _known(gpu, "compute_capability")
    # CUDA's total excludes the bytes that the driver reserves; unknown bytes count as 0.
    reserved = gpu.reserved if isinstance(gpu.reserved, int) else 0
    return PretendGpu(
        name=gpu.name,
        total=total - reserved,
        used=_known(gpu, "used"),
        sm=capability,
        sm_count=_known(gpu, "sm_count"),
        l2=_known(gpu, "l2"),
        reserved=reserved,
    )


def _known(gpu: Gpu, field: str) -> Any:
    """Return a value of a GPU.

    Raises:
        MachineError: the value is unknown.
    """
    value = getattr(gpu, field)
    if not isinstance(value, (int, tuple)):
        raise MachineError(
            f"GPU {gpu.index} ({gpu.name}): its {field} is not known",
            hint="name the card as turbofit gpus lists it: a pretend machine needs this value",
        )
    return value
