"""Host memory, shared memory, disks, ports and the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.diagnose.doctor.finding import Finding, ok, stops, unreadable, warning
from turbofit.model.hub_cache import hub_cache
from turbofit.planning.ranks import rank_warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.machine import Host, Machine
    from turbofit.core.model import Model
    from turbofit.diagnose.doctor.sources import Sources

__all__ = ["host_findings"]

#: What one server process takes of host memory at least, and with images in flight.
_LEAST_RAM: Final = 4 * GIB
_GOOD_RAM: Final = 8 * GIB
#: NCCL through host memory: its own buffers of a group; below the first it fails at start.
_LEAST_SHM: Final = 256 * MIB
_GOOD_SHM: Final = GIB
_DISK: Final = 20 * GIB
_LOCKED: Final = 64 * MIB


def host_findings(
    sources: Sources, machine: Machine | None, model: Model | None, port: int | None
) -> Iterator[Finding]:
    """Everything around the GPUs."""
    described = machine is not None and machine.host.ram_available != NA
    host = machine.host if machine is not None and described else sources.host()
    yield _ram(host, model)
    yield _locked(sources)
    yield _shm(machine, host)
    yield _disk(sources, model)
    yield _port(sources, port)
    yield _launcher(sources, machine)
    yield _variables(sources)


def _ram(host: Host, model: Model | None) -> Finding:
    check = "host_memory"
    why = (
        "a server process takes about 4 GiB, pinned buffers and images come on top; when it runs"
        " out, the kernel kills the engine (exit code 137)"
    )
    available = host.ram_available
    if available == NA:
        return unreadable(check, "available host memory", why)
    seen = f"{format_bytes(available)} available"
    if available < _LEAST_RAM:
        return stops(check, seen, why, "free host memory, or raise the container's limit")
    if available < _GOOD_RAM:
        return warning(check, seen, why, "free host memory, or run fewer replicas")
    if model is not None and available < model.weight_bytes:
        return ok(check, f"{seen}; weights pass through it piece by piece")
    return ok(check, seen)


def _locked(sources: Sources) -> Finding:
    """CUDA pins through the driver, which this limit does not bind; RDMA is bound by it."""
    check = "locked_memory"
    why = "NCCL over InfiniBand registers its buffers under this limit and fails below it"
    limit = sources.locked_memory()
    if limit == NA:
        return unreadable(check, "ulimit -l", why)
    if limit is None:
        return ok(check, "ulimit -l: unlimited")
    adapters = sources.names("sys/class/infiniband")
    if adapters and limit < _LOCKED:
        return warning(
            check,
            f"ulimit -l: {format_bytes(limit)}, beside {', '.join(adapters)}",
            why,
            "ulimit -l unlimited, --ulimit memlock=-1 in a container, or NCCL_IB_DISABLE=1",
        )
    return ok(
        check, f"ulimit -l: {format_bytes(limit)}; CUDA's own pinned memory is not bound by it"
    )


def _shm(machine: Machine | None, host: Host) -> Finding:
    check = "shared_memory"
    why = (
        "NCCL between GPUs without peer access, and Ray, exchange data through /dev/shm; Docker"
        " gives a container 64 MiB"
    )
    available = host.shm_available
    if available == NA:
        return unreadable(check, "/dev/shm", why)
    seen = f"/dev/shm has {format_bytes(available)} free"
    several = machine is not None and len(machine.visible) > 1
    lonely = machine is not None and any(
        not machine.link(a, b).peers for a in machine.visible for b in machine.visible if a < b
    )
    fix = "docker run --shm-size 8g, or --ipc host"
    if lonely and available < _LEAST_SHM:
        return stops(check, seen, f"{why}: tp > 1 fails at start", fix)
    if several and available < _GOOD_SHM:
        return warning(check, seen, why, fix)
    return ok(check, seen)


def _disk(sources: Sources, model: Model | None) -> Finding:
    """Where the hub's files go."""
    check, cache = "disk", hub_cache(sources.environ)
    found = sources.disk_free(cache)
    need = model.weight_bytes if model else _DISK
    why = f"weights are downloaded there: {format_bytes(need)} for this model"
    if model is None:
        why = "weights are downloaded there: 16 GiB for a model of 8 B parameters"
    if found is None:
        return unreadable(check, cache, why)
    free, writable = found
    seen = f"{cache}: {format_bytes(free)} free"
    fix = "set HF_HOME to a larger disk, or remove old models"
    if not writable:
        why = "a model that is not in its cache cannot be downloaded"
        return warning(check, f"{seen}, not writable", why, fix)
    if free < need:
        return warning(check, seen, why, fix)
    return ok(check, seen)


def _port(sources: Sources, port: int | None) -> Finding:
    """The public port; the replicas' own are free ones, chosen at launch."""
    check, wanted = "port", DEFAULT_PORT if port is None else port
    problem = sources.port_problem("127.0.0.1", wanted)
    if problem is None:
        return ok(check, f"port {wanted} is free")
    if "in use" not in problem:
        return unreadable(check, problem, "the server could not open its port")
    return stops(
        check,
        f"port {wanted} is taken",
        "often by an earlier server, which still holds its GPU memory too",
        f"end it (ss -ltnp 'sport = :{wanted}'), or choose another --port",
    )


def _launcher(sources: Sources, machine: Machine | None) -> Finding:
    """torchrun, srun and mpirun start a program once for each rank."""
    check = "rank_launcher"
    several = machine is None or len(machine.visible) > 1
    told = rank_warning(2 if several else 1, sources.environ)
    if told:
        return stops(
            check,
            told,
            "TurboMind drives all GPUs of a group from one process",
            "start it once, without torchrun, srun or mpirun",
        )
    return ok(check, "no rank launcher's variables")


def _variables(sources: Sources) -> Finding:
    """Variables that change memory or speed behind a plan's back."""
    check, env = "environment", sources.environ
    told = []
    if env.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        told.append("CUDA_LAUNCH_BLOCKING makes every kernel wait")
    if env.get("CUDA_MODULE_LOADING", "").upper() == "EAGER":
        told.append("CUDA_MODULE_LOADING=EAGER loads every kernel into GPU memory")
    if env.get("TM_LOG_LEVEL", "").upper() in ("TRACE", "DEBUG"):
        told.append("TM_LOG_LEVEL logs each step")
    if "pretend" in env.get("LD_PRELOAD", "") or "pretend" in env.get("LD_LIBRARY_PATH", ""):
        told.append("the pretend GPUs' libraries are in the loader's path")
    if told:
        return warning(
            check,
            "; ".join(told),
            "speed or memory are not those of a plan",
            "unset them for serving",
        )
    return ok(check, "nothing set that changes a plan")
