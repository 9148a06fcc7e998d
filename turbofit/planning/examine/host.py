"""Checks of host memory, shared memory, disks, ports, limits and the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from turbofit.core.machine import Host
from turbofit.core.plan import Plan
from turbofit.core.process.network import DEFAULT_PORT
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.planning.examine.scene import Answer, Scene, Sources, ok, stops, unreadable, warning

#: The least host memory of one server process.
_LEAST_RAM: Final = 4 * GIB
#: Host memory of an engine on pretend GPUs, as rehearsals measured: 436 to 600 MB with the server.
_PRETEND_BYTES: Final = 700 * MIB
#: Shared memory for NCCL's buffers of a group without peer access; with less the start may fail.
_LEAST_SHM: Final = 256 * MIB
_DISK: Final = 20 * GIB
#: Logs rotate at 16 MiB and keep one old file; the record and the overlay are small.
_RUN_BYTES: Final = 64 * MIB
_FILES: Final = 1024


def host_memory(host: Host, scene: Scene) -> Answer:
    """Check that available host memory is enough for the plan, or without a plan for any server."""
    available = host.ram_available
    if available == NA:
        return unreadable("available host memory")
    text = f"{format_bytes(available)} available"
    if scene.plan is not None:
        plan, replicas = scene.plan, scene.plan.replicas
        need, what = plan.host.total, "engines"
        if scene.pretend:
            need, what = replicas * _PRETEND_BYTES, "pretend engines"
        if need <= available:
            return ok(text)
        return stops(
            f"{replicas} {what} need {format_bytes(need)} of host memory, "
            f"{format_bytes(available)} are available",
            "free host memory, or start fewer with --replicas",
        )
    if available < _LEAST_RAM:
        return stops(text, "free host memory, or raise the container's limit")
    return ok(text)


def shared_memory(host: Host, scene: Scene) -> Answer:
    """Check the free shared memory (``/dev/shm``): NCCL needs it for GPUs without peer access.

    The engines of a plan need shared memory only with NCCL; engines on pretend GPUs need none.
    """
    available, plan = host.shm_available, scene.plan
    uses_nccl = scene.machine is not None and len(scene.machine.visible) > 1
    if plan is not None:
        nccl = plan.backend.communicator == "nccl"
        uses_nccl = nccl and plan.tp > 1 and not scene.pretend
    if available == NA:
        return unreadable("/dev/shm")
    text = f"/dev/shm has {format_bytes(available)} free"
    if not uses_nccl or available >= _LEAST_SHM:
        return ok(text)
    fix = "in a container --shm-size=8g or --ipc=host"
    return warning(f"{text}: NCCL may fail in it ({fix})", fix)


def disk(sources: Sources, scene: Scene) -> Answer:
    """Check that the disk with the hub's files is writable and has space for the model."""
    from turbofit.model.folder import hub_cache

    cache, model = hub_cache(sources.environ), scene.model
    space, need = sources.disk_free(cache), model.weight_bytes if model else _DISK
    why = f"weights are downloaded there: {format_bytes(need)} for this model" if model else ""
    if space is None:
        return unreadable(cache, why=why)
    free, writable = space
    text, fix = (
        f"{cache}: {format_bytes(free)} free",
        "set HF_HOME to a larger disk, or remove old models",
    )
    if not writable:
        why = "a model that is not in its cache cannot be downloaded"
        return warning(f"{text}, not writable", fix, why)
    return warning(text, fix, why) if free < need else ok(text)


def run_disk(folder: Path, scene: Scene) -> Answer | None:
    """Check that the disk has space for the logs and the record of a run."""
    space = scene.sources.disk_free(str(folder))
    if space is None or space[0] >= _RUN_BYTES:
        return None
    free, need = map(format_bytes, (space[0], _RUN_BYTES))
    return stops(
        f"{folder} has {free} left, logs and records need {need}",
        "free disk space, or set XDG_STATE_HOME to another disk",
    )


def port(sources: Sources, scene: Scene) -> Answer | None:
    """Check that the public port is free; with a plan, check the ports of its engines instead.

    The ports of engines were chosen earlier in the launch, and may be taken since.
    """
    if scene.plan is not None:
        problems = (sources.port_problem("127.0.0.1", number) for number in scene.ports)
        problem = next((problem for problem in problems if problem is not None), None)
        return None if problem is None else stops(problem, "choose another with --port")
    wanted = DEFAULT_PORT if scene.port is None else scene.port
    problem = sources.port_problem("127.0.0.1", wanted)
    if problem is None:
        return ok(f"port {wanted} is free")
    if "in use" not in problem:
        return unreadable(problem, why="the server could not open its port")
    end = f"end it (ss -ltnp 'sport = :{wanted}')"
    if scene.server:
        end = f"it is a server of turbofit: turbofit stop {scene.server}"
    return stops(f"port {wanted} is taken", f"{end}, or choose another --port")


def open_files(plan: Plan, scene: Scene) -> Answer | None:
    """Raise the limit of open files, which engines inherit; warn if the limit stays too low."""
    need = _FILES + 4 * plan.requests_at_once
    allowed = scene.sources.open_files(need)
    if allowed >= need:
        return None
    return warning(
        f"{allowed} open files are allowed, but the plan's connections may need {need}: "
        f"raise ulimit -n (process {os.getpid()} cannot raise its limit above {allowed})",
        "",
    )


def rank_launcher(sources: Sources, scene: Scene) -> Answer:
    """Stop a start by torchrun or another launcher that sets ``WORLD_SIZE`` or ``LOCAL_RANK``.

    TurboMind uses all GPUs of a group from one process, so each rank would start a whole engine.
    """
    # Without a plan, 2 stands for any tp above 1 that a plan may choose.
    tp = 1 if scene.machine is not None and len(scene.machine.visible) < 2 else 2
    tp = tp if scene.plan is None else scene.plan.tp
    world, rank = sources.environ.get("WORLD_SIZE", ""), sources.environ.get("LOCAL_RANK")
    if world.isdecimal() and int(world) > 1:
        variable, engines = f"WORLD_SIZE={int(world)}", f"{int(world)} whole engines"
    else:
        variable, engines = f"LOCAL_RANK={rank}", "a whole engine"
        tp = 1 if rank is None else tp
    if tp < 2:
        return ok("no rank launcher's variables")
    return stops(
        f"{variable} is set, so a rank launcher like torchrun runs turbofit: with tp {tp} its"
        f" ranks would start {engines} on the same cards; start turbofit once, without the"
        " launcher",
        "start turbofit once, without torchrun, srun or mpirun",
    )
