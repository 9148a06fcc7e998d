"""The pretend twin of a machine that turbofit measured, or was told of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turbofit.core.errors import MachineError
from turbofit.core.machine import Gpu, Machine
from turbofit.pretend.scenario import PretendGpu, Scenario

__all__ = ["pretend_twin"]


def pretend_twin(machine: Machine, indices: Sequence[int]) -> Scenario:
    """Some GPUs of a machine as pretend ones, without anything of our own on them.

    Args:
        machine: measured, or parsed from a SPEC.
        indices: the GPUs of one replica, in the order in which CUDA would number them.

    Raises:
        MachineError: it has no such GPU, or something of one is not known.
    """
    gpus = {gpu.index: gpu for gpu in machine.gpus}
    missing = [i for i in indices if i not in gpus]
    if missing:
        raise MachineError(f"the machine has no GPU {missing[0]}", hint=f"it has {sorted(gpus)}")
    reach = [
        pair
        for link in machine.links
        if link.peers and link.a in indices and link.b in indices
        for pair in ((link.a, link.b), (link.b, link.a))
    ]
    place = {index: position for position, index in enumerate(indices)}
    return Scenario(
        gpus=tuple(_gpu(gpus[i]) for i in indices),
        peers=frozenset((place[a], place[b]) for a, b in reach),
    )


def _gpu(gpu: Gpu) -> PretendGpu:
    total, capability = _known(gpu, "total"), _known(gpu, "compute_capability")
    # What CUDA calls total excludes what the driver keeps; where that cannot be read, it is all.
    reserved = gpu.reserved if isinstance(gpu.reserved, int) else 0
    return PretendGpu(
        name=gpu.name,
        total=total - reserved,
        used=_known(gpu, "used"),
        sm=capability,
        sm_count=_known(gpu, "sm_count"),
        l2=_known(gpu, "l2"),
    )


def _known(gpu: Gpu, field: str) -> Any:
    value = getattr(gpu, field)
    if not isinstance(value, (int, tuple)):
        raise MachineError(
            f"GPU {gpu.index} ({gpu.name}): its {field} is not known",
            hint="a pretend machine needs it: name the card as turbofit gpus lists it",
        )
    return value
