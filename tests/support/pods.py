"""Cards as a pod has them."""

from __future__ import annotations

from msgspec.structs import replace

from turbofit.core.machine import Machine
from turbofit.machine.spec import parse_spec


def pod(spec: str = "2xrtx3090") -> Machine:
    """Cards that NVML reads whole, with UUIDs."""
    machine = parse_spec(spec)
    gpus = tuple(replace(gpu, uuid=f"GPU-{gpu.index}a") for gpu in machine.gpus)
    return replace(machine, gpus=gpus, source="nvml", warnings=())
