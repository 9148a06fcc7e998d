"""The machine as a launch must count it: with what other turbofits have reserved; and orphans."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.machine import Holder
from turbofit.launch.engine.proc import members

if TYPE_CHECKING:
    from turbofit.core.machine import Gpu, Machine
    from turbofit.launch.serve.leases import Lease, Leases

__all__ = ["counted", "end_orphans"]

_END_SECONDS: Final = 5.0


def counted(machine: Machine, leases: Leases) -> Machine:
    """The machine with what other turbofits will still take counted as used.

    Where NVML does not show who holds memory, a lease counts whole until its engines are ready:
    over, never under.
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

    Where they do not tell how large their caches are, what they hold may be cache beyond the plan.
    So the whole growth stays reserved. Over: by what they have grown already.
    """
    need = lease.need.get(gpu.uuid, 0)
    if not need:
        return 0
    growth = lease.growth.get(gpu.uuid, need)
    need += lease.surplus.get(gpu.uuid, 0)
    held = [h for h in gpu.holders if isinstance(h.pid, int) and lease.holds(h.pid)]
    known = [h.bytes for h in held if isinstance(h.bytes, int)]
    if held and len(known) == len(held):
        return max(0 if lease.told else growth, need - sum(known))
    return growth if lease.settled else need


def end_orphans(leases: Leases) -> list[str]:
    """End what engines of dead turbofits left behind, and drop their leases; what was done.

    Only processes of our user are touched, and only those of a group that a lease names with the
    time at which it began.
    """
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
