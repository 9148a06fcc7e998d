"""What would make a launch fail after minutes of loading, looked at before them."""

from __future__ import annotations

import os
import resource
import shutil
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import DoesNotFitError, LaunchError
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.gateway.http.sockets import open_files
from turbofit.launch.engine.launches import HOST

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from turbofit.core.machine import Host
    from turbofit.core.plan import Plan

__all__ = ["check_before"]

#: An engine on pretend GPUs, as rehearsals measured it: 436 to 600 MB with its server.
_PRETEND_BYTES: Final = 700 * MIB
#: Logs rotate at 16 MiB and keep one before; the record and the overlay are small.
_RUN_BYTES: Final = 64 * MIB
_FILES: Final = 1024
_SHM_BYTES: Final = 64 * MIB


def check_before(
    plan: Plan, host: Host, folder: Path, ports: Sequence[int], *, pretend: bool
) -> list[str]:
    """Refuse what cannot work; returns warnings.

    Args:
        plan: what will be launched.
        host: host memory now.
        folder: the run's.
        ports: that the engines will listen on.
        pretend: whether the GPUs are pretend ones.

    Raises:
        DoesNotFitError: host memory is short.
        LaunchError: a limit, a port or a disk.
    """
    from turbofit.launch.engine.environment import check_port

    _ram(plan, host, pretend=pretend)
    for port in ports:
        check_port(HOST, port)
    _disk(folder)
    warnings = _limits(plan, pretend=pretend)
    if not pretend and plan.parallel.tp > 1 and plan.settings.communicator == "nccl":
        warnings += _shm(host)
    return warnings


def _ram(plan: Plan, host: Host, *, pretend: bool) -> None:
    replicas = plan.parallel.replicas
    need = replicas * _PRETEND_BYTES if pretend else plan.host.pinned + plan.host.pageable
    if host.ram_available == NA or need <= host.ram_available:
        return
    what = "pretend engines" if pretend else "engines"
    raise DoesNotFitError(
        f"{replicas} {what} need {format_bytes(need)} of host memory, "
        f"{format_bytes(host.ram_available)} are available",
        hint="free host memory, or start fewer with --replicas",
    )


def _disk(folder: Path) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if free < _RUN_BYTES:
        raise LaunchError(
            f"{folder} has {format_bytes(free)} left, logs and records need "
            f"{format_bytes(_RUN_BYTES)}",
            hint="free disk space, or set XDG_STATE_HOME to another disk",
        )


def _limits(plan: Plan, *, pretend: bool) -> list[str]:
    """Raise what may be raised; engines inherit it.

    Raises:
        LaunchError: an address space limit, under which CUDA cannot start.
    """
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY and not pretend:
        raise LaunchError(
            f"the address space is limited to {format_bytes(space)}: CUDA maps hundreds of GiB of "
            "it and would not start",
            hint="ulimit -v unlimited",
        )
    need = _FILES + 4 * sum(one.settings.max_batch_size for one in plan.each())
    allowed = open_files(need)
    if allowed < need:
        return [
            f"{allowed} open files are allowed, this many connections may need {need}: "
            f"raise ulimit -n (now limited to {allowed}, {os.getpid()} cannot go beyond)"
        ]
    return []


def _shm(host: Host) -> list[str]:
    """NCCL without peer access passes everything through /dev/shm; containers give it 64 MiB."""
    if host.shm_available == NA or host.shm_available > _SHM_BYTES:
        return []
    return [
        f"/dev/shm has {format_bytes(host.shm_available)} left: NCCL may fail in it "
        f"(in a container: --shm-size={8 * GIB // GIB}g or --ipc=host)"
    ]
