"""The pretend twin of a machine that turbofit measured, or was told of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turbofit.core.errors import MachineError
from turbofit.core.machine import Gpu, Machine


def machine_part(machine: Machine, indices: Sequence[int], context: int = 0) -> dict[str, Any]:
    """The ``machine`` part of a rehearsal's specification; sizes are bytes.

    Args:
        machine: measured, or parsed from a SPEC.
        indices: the GPUs of one replica, in the order in which CUDA would number them.
        context: bytes charged to each card for what a rehearsal cannot know (CUDA context,
            kernel modules, NCCL's buffers); from presets or a calibration.
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
    return {
        "gpus": [_gpu(gpus[i], context) for i in indices],
        "p2p": [[place[a], place[b]] for a, b in reach],
    }


def _gpu(gpu: Gpu, context: int) -> dict[str, Any]:
    total, capability = _known(gpu, "total"), _known(gpu, "compute_capability")
    # What CUDA calls total excludes what the driver keeps; where that cannot be read, it is all.
    reserved = gpu.reserved if isinstance(gpu.reserved, int) else 0
    return {
        "name": gpu.name,
        "total": total - reserved,
        "used": _known(gpu, "used") + context,
        "sm": list(capability),
        "sm_count": _known(gpu, "sm_count"),
        "l2": _known(gpu, "l2"),
    }


def _known(gpu: Gpu, field: str) -> Any:
    value = getattr(gpu, field)
    if not isinstance(value, (int, tuple)):
        raise MachineError(
            f"GPU {gpu.index} ({gpu.name}): its {field} is not known",
            hint="a pretend machine needs it: name the card as turbofit gpus lists it",
        )
    return value
