"""The machine as a launch counts it: with what other turbofits reserved, and without orphans."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.machine import Holder
from turbofit.launch.engine.kernel import members

if TYPE_CHECKING:
    from turbofit.core.machine import Gpu, Machine
    from turbofit.launch.serve.leases import Lease, Leases


_END_SECONDS: Final = 5.0


def counted(machine: Machine, leases: Leases) -> Machine:
    """The machine with what other turbofits will still take counted as used.

    Over where NVML does not show who holds memory: a lease counts whole until it is ready.
    """
    others = leases.others()
    if not others:
        return machine
    return replace(machine, gpus=tuple(_gpu(gpu, others) for gpu in machine.gpus))


def _gpu(gpu: Gpu, others: list[Lease]) -> Gpu:
    for lease in others:
        pending = _pending(gpu, lease)
        if pending and isinstance(gpu.used, int) and isinstance(gpu.free, int):
            name = f"turbofit, which reserved it for {lease.model}"
            gpu = replace(
                gpu,
                used=gpu.used + min(pending, gpu.free),
                free=max(0, gpu.free - pending),
                holders=(*gpu.holders, Holder(pid=lease.pid, name=name, bytes=pending)),
            )
    return gpu


def _pending(gpu: Gpu, lease: Lease) -> int:
    """Bytes that a lease's engines will still take on a GPU.

    Where their caches may be larger than in the plan, what they hold does not tell how far they
    have grown. Over there: by what they have grown already.
    """
    need = lease.need.get(gpu.uuid, 0)
    growth = lease.growth.get(gpu.uuid, need)
    holders = [h for h in gpu.holders if isinstance(h.pid, int) and lease.holds(h.pid)]
    known = [h.bytes for h in holders if isinstance(h.bytes, int)]
    if holders and len(known) == len(holders):
        return max(growth if lease.larger else 0, need - sum(known))
    return growth if lease.settled else need


def end_orphans(leases: Leases) -> list[str]:
    """End what engines of our user's dead turbofits left, and drop their leases; what was done."""
    done = []
    for lease in leases.stale():
        for pid, started in lease.engines:
            left = members(pid, started)
            if left:
                _end(pid, started)
                done.append(
                    f"ended {len(left)} processes that an engine for {lease.model} had left behind "
                    f"when turbofit, process {lease.pid}, was killed"
                )
        leases.drop(lease)
    return done


def _end(group: int, started: int) -> None:
    deadline = time.monotonic() + _END_SECONDS
    while members(group, started) and time.monotonic() < deadline:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.05)
