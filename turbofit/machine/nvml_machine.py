"""Measures this machine and its cards through NVML."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.errors import NoGpuError
from turbofit.core.machine import Gpu, Holder, Link, Machine, Pcie, named_cards
from turbofit.core.struct import NA, NaType, known
from turbofit.machine.host import read_host
from turbofit.machine.nvml import GpuLostError, Nvml, answered, ask_driver
from turbofit.machine.presets import fill, match_preset, share_of
from turbofit.machine.visible import cuda_visible, held_to_slices

#: The values of nvmlGpuTopologyLevel.
_ANCESTOR: Final = {
    0: "internal",
    10: "single",
    20: "multiple",
    30: "hostbridge",
    40: "node",
    50: "system",
}
#: Values of nvmlGpuP2PCapsIndex (pynvml's constant for READ is a tuple by mistake).
_P2P_READ, _P2P_WRITE, _P2P_NVLINK = 0, 1, 2
#: Values of nvmlGpuP2PStatus, which NVML answers to a query of peer access.
_P2P_OK: Final = 0
_P2P_UNKNOWN: Final = 6
#: The type of an NVLink's other end that means a switch.
_SWITCH: Final = 2
#: The most seconds for reading all GPUs.
_LONGEST: Final = 120.0

Address = tuple[int, ...]
#: The number of a GPU's active NVLink lanes by the address of the other end. The address is None if
#: the other end is a switch or unknown.
Lanes = Counter[Address | None]

_MOST_NVLINKS: Final = 18  # NVML_NVLINK_MAX_LINKS
#: The holder's name for memory that no visible process explains.
UNKNOWN_HOLDER: Final = "unknown (another container?)"
#: CUDA cores of an SM by compute capability (CUDA C++ Programming Guide, arithmetic throughput).
_CORES: Final = {
    (6, 0): 64, (6, 1): 128, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64, (8, 6): 128,
    (8, 7): 128, (8, 9): 128, (9, 0): 128, (10, 0): 128, (10, 3): 128, (12, 0): 128, (12, 1): 128,
}  # fmt: skip
_PROCESS_LISTS: Final = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMPSComputeRunningProcesses",
)


def measure(environ: Mapping[str, str]) -> Machine:
    """Read GPUs, links and host; ``visible`` are the GPUs left by ``CUDA_VISIBLE_DEVICES``.

    Raises:
        NoGpuError: no NVML, no GPU, or all hidden.
    """
    with Nvml() as nvml:
        devices = read_devices(nvml)
        links = _links(nvml, devices)
        driver = nvml.query("nvmlSystemGetDriverVersion")
        cuda = nvml.query("nvmlSystemGetCudaDriverVersion_v2")
    visible, notes = _visible(devices, environ)
    gpus = [gpu for device in devices for gpu in device.gpus]
    of_devices = [note for device in devices for note in device.warnings]
    machine = Machine(
        name=named_cards(gpu for gpu in gpus if gpu.index in visible or not visible),
        source="nvml",
        gpus=tuple(sorted(gpus, key=lambda gpu: gpu.index)),
        links=links,
        host=read_host(),
        driver=str(driver),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if answered(cuda) else NA,
        visible=visible,
        warnings=(*of_devices, *notes),
    )
    return held_to_slices(machine, environ)


def measure_in_time(environ: Mapping[str, str]) -> Machine:
    """Call `measure`; raise NoGpuError if the driver does not answer within two minutes."""
    machine = ask_driver(partial(measure, environ), None, seconds=_LONGEST)
    if machine is None:
        raise NoGpuError(
            f"the NVIDIA driver has not answered for {_LONGEST:g} s",
            hint="look for NVRM and Xid in `sudo dmesg`, and restart the machine; or describe a "
            "machine with `--on SPEC`",
        )
    return machine


def read_devices(nvml: Nvml) -> list[Device]:
    """Read all devices, in PCI order.

    Raises:
        NoGpuError: NVML sees no GPU.
    """
    count = nvml.query("nvmlDeviceGetCount")
    if not answered(count) or count < 1:
        raise NoGpuError(
            "NVML sees no GPU",
            hint="check nvidia-smi (in a container: --gpus all), or use `--on SPEC`",
        )
    devices = [_opened(nvml, place) for place in range(count)]
    if all(device.bus for device in devices):
        devices.sort(key=lambda device: device.bus or ())
    next_part = count  # MIG instances get their numbers after all whole GPUs
    for index, device in enumerate(devices):
        _read(nvml, device, index, next_part)
        next_part += sum(gpu.mig for gpu in device.gpus)
    return devices


def _opened(nvml: Nvml, place: int) -> Device:
    """Open the device with NVML's number ``place``; only its address is read."""
    device = Device()
    try:
        device.handle = nvml.query("nvmlDeviceGetHandleByIndex", place)
        if answered(device.handle):
            device.bus = _address(nvml.query("nvmlDeviceGetPciInfo", device.handle))
        else:
            device.lost = nvml.reason
    except GpuLostError as exc:
        device.lost = str(exc)
    return device


def _address(pci: Any) -> Address | None:
    return (pci.domain, pci.bus, pci.device) if answered(pci) else None


def _visible(
    devices: Sequence[Device], environ: Mapping[str, str]
) -> tuple[tuple[int, ...], list[str]]:
    """Return the GPUs that a CUDA program would see, and warnings about them."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return tuple(index for device in devices for index in device.default), []
    ordinals = [device.default[0] for device in devices if device.default]
    ids = {name: index for device in devices for name, index in device.ids.items()}
    visible, warning = cuda_visible(value, ordinals, ids)
    if not visible:
        raise NoGpuError(
            warning or f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU",
            hint="unset or correct CUDA_VISIBLE_DEVICES, or describe a machine with `--on SPEC`",
        )
    return visible, [warning] if warning else []


def _links(nvml: Nvml, devices: Sequence[Device]) -> tuple[Link, ...]:
    """Return the links between whole GPUs as measured; a MIG instance has no peers."""
    gpus = [gpu for device in devices for gpu in device.gpus]
    links = [
        Link(a=first.index, b=part.index, p2p_read=False, p2p_write=False, nvlinks=0)
        for first, part in combinations(sorted(gpus, key=lambda gpu: gpu.index), 2)
        if part.mig  # a MIG instance has a higher index than a whole GPU
    ]
    whole = [
        device
        for device in devices
        if answered(device.handle) and device.gpus and not device.gpus[0].mig
    ]
    buses = {device.bus for device in whole if device.bus}
    lanes = {device.index: _lanes(nvml, device, buses) for device in whole}
    links += [_link(nvml, first, second, lanes) for first, second in combinations(whole, 2)]
    return tuple(sorted(links, key=lambda link: (link.a, link.b)))


def _link(nvml: Nvml, first: Device, second: Device, lanes: Mapping[int, Lanes | None]) -> Link:
    """Return the link between two whole GPUs; all fields are ``NA`` if a GPU is lost."""
    handles = (first.handle, second.handle)
    try:
        over_nvlink = _p2p(nvml, *handles, _P2P_NVLINK)
        read = _p2p(nvml, *handles, _P2P_READ)
        write = _p2p(nvml, *handles, _P2P_WRITE)
        level = nvml.query("nvmlDeviceGetTopologyCommonAncestor", *handles)
    except GpuLostError:
        return Link(a=first.index, b=second.index)
    count = _shared_lanes(lanes[first.index], lanes[second.index], second.bus, over_nvlink)
    preset = match_preset(first.gpus[0])
    speed = count * preset.nvlink.lane_bandwidth if preset and count != NA and count else NA
    return Link(
        a=first.index,
        b=second.index,
        p2p_read=read,
        p2p_write=write,
        nvlinks=count,
        nvlink_bandwidth=speed,
        ancestor=_ANCESTOR.get(level, NA) if answered(level) else NA,
    )


def _p2p(nvml: Nvml, first: Any, second: Any, capability: int) -> bool | NaType:
    """Return whether peer access works both ways; ``NA`` if that is unknown."""
    ways = ((first, second), (second, first))
    statuses = {nvml.query("nvmlDeviceGetP2PStatus", *way, capability) for way in ways}
    if statuses - {_P2P_OK, _P2P_UNKNOWN, NA}:
        return False
    return True if statuses == {_P2P_OK} else NA


def _shared_lanes(
    first: Lanes | None, second: Lanes | None, bus: Address | None, over_nvlink: bool | NaType
) -> int | NaType:
    """Return the number of NVLink lanes between two GPUs; `NA` if it is unknown.

    ``first`` and ``second`` are the lanes of each GPU, ``bus`` is the second one's address. If the
    GPUs have no direct lanes, the lanes through switches count. ``over_nvlink`` says whether the
    driver allows peer access over NVLink.
    """
    if first is None or second is None:
        return NA
    direct = first[bus] if bus else 0
    if direct or over_nvlink is False:
        return direct
    switched = min(first[None], second[None])
    is_known = over_nvlink is True or not switched
    return switched if is_known else NA


def _lanes(nvml: Nvml, device: Device, buses: set[Address]) -> Lanes | None:
    """Return the active lanes of a GPU; empty if it has no NVLink, None if they cannot be read."""
    lanes = Lanes()
    try:
        for link in range(_MOST_NVLINKS):
            state, supported = nvml.query_and_support(
                "nvmlDeviceGetNvLinkState", device.handle, link
            )
            if not answered(state):  # no more links, no NVLink, or not readable
                return lanes if link or not supported else None
            if not state:
                continue
            address = _address(nvml.query("nvmlDeviceGetNvLinkRemotePciInfo", device.handle, link))
            if address in buses:
                lanes[address] += 1
                continue
            kind = nvml.query("nvmlDeviceGetNvLinkRemoteDeviceType", device.handle, link)
            if kind == _SWITCH or not answered(kind):
                lanes[None] += 1
    except GpuLostError:
        return None
    return lanes


@dataclass
class Device:
    """A physical GPU; for planning, it is one GPU, or one GPU for each of its MIG instances.

    ``gpus`` are the GPUs for planning; ``default`` are the indices that a plan may use. A CUDA
    program sees only the first GPU in ``default``. ``ids`` gives the index for each name
    that ``CUDA_VISIBLE_DEVICES`` may use. ``lost`` says why NVML gives no handle.
    """

    handle: Any = NA
    bus: Address | None = None
    lost: str = ""
    index: int = 0
    gpus: list[Gpu] = field(default_factory=list)
    default: list[int] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def _read(nvml: Nvml, device: Device, index: int, first_part: int) -> None:
    """Read one device and its GPUs.

    A lost device becomes a GPU without known figures, and a warning.
    """
    device.index, handle = index, device.handle
    try:
        if device.lost:
            raise GpuLostError(device.lost)
        mode = nvml.query("nvmlDeviceGetMigMode", handle)
        if answered(mode) and mode[0]:
            _read_parts(nvml, device, first_part)
            return
        gpu, device.warnings = _read_gpu(nvml, index, handle)
        gpu = fill(gpu)
    except GpuLostError as exc:
        gpu = Gpu(index=index, uuid=NA, name="lost GPU", total=NA, reserved=NA, used=NA, free=NA)
        device.warnings = [f"GPU {index} cannot be read: {exc}"]
    # A lost GPU keeps its index: a user means it by this index, even if CUDA shows another GPU.
    device.gpus, device.default = [gpu], [index]
    device.ids = {} if gpu.uuid == NA else {gpu.uuid: index}


def _read_gpu(nvml: Nvml, index: int, handle: Any) -> tuple[Gpu, list[str]]:
    """Read a GPU or a MIG instance by its handle; the list has warnings."""
    name = str(nvml.query("nvmlDeviceGetName", handle))
    sizes = _memory(nvml, handle)
    unread = f"GPU {index} ({name}): its memory cannot be read"
    warnings = [unread] if sizes["total"] == NA else []
    capability = nvml.query("nvmlDeviceGetCudaComputeCapability", handle)
    cc = (int(capability[0]), int(capability[1])) if answered(capability) else None
    cores = nvml.query("nvmlDeviceGetNumGpuCores", handle)
    per_sm = _CORES.get(cc) if cc and answered(cores) else None
    gpu = Gpu(
        index=index,
        uuid=str(nvml.query("nvmlDeviceGetUUID", handle)),
        name=name,
        compute_capability=cc or NA,
        sm_count=cores // per_sm if per_sm and cores and cores % per_sm == 0 else NA,
        pcie=Pcie(
            generation=nvml.query("nvmlDeviceGetMaxPcieLinkGeneration", handle),
            width=nvml.query("nvmlDeviceGetMaxPcieLinkWidth", handle),
        ),
        holders=_holders(nvml, handle, sizes["used"]),
        **sizes,
    )
    return gpu, warnings


def _memory(nvml: Nvml, handle: Any) -> dict[str, Any]:
    """Return the sizes of a device's memory in bytes; the sizes add up, or all are NA."""
    info = nvml.memory(handle)
    if not answered(info) or not info.total or info.free > info.total:
        return {"total": NA, "reserved": NA, "used": NA, "free": NA}
    total, free = int(info.total), int(info.free)
    used = min(int(info.used), total - free)
    return {"total": total, "reserved": total - used - free, "used": used, "free": free}


def _holders(nvml: Nvml, handle: Any, used: int | NaType) -> tuple[Holder, ...]:
    """Return who holds memory: visible processes, the largest first, then the unexplained rest."""
    sizes: dict[int, int | NaType] = {}
    for function in _PROCESS_LISTS:
        processes = nvml.query(function, handle)
        for process in processes if answered(processes) else ():
            size = NA if process.usedGpuMemory is None else int(process.usedGpuMemory)
            # A process may be in several lists; its largest size counts.
            known_sizes = (sizes.get(int(process.pid), NA), size)
            sizes[int(process.pid)] = max(known_sizes, key=lambda size: known(size, -1))
    holders = [
        Holder(pid=pid, name=_process_name(nvml, pid), bytes=size) for pid, size in sizes.items()
    ]
    holders.sort(key=lambda holder: (holder.bytes == NA, -known(holder.bytes, 0), str(holder.pid)))
    rest = known(used, 0) - sum(known(size, 0) for size in sizes.values())
    if rest > 0:
        holders.append(Holder(pid=NA, name=UNKNOWN_HOLDER, bytes=rest))
    return tuple(holders)


def _process_name(nvml: Nvml, pid: int) -> str:
    """Return the file name of a process's program, or its pid if NVML does not know the name."""
    name = nvml.query("nvmlSystemGetProcessName", pid)
    pieces = str(name).split() if answered(name) else []
    base = os.path.basename(pieces[0]) if pieces else ""
    return "".join(c for c in base if c.isprintable()) or f"process {pid}"


def _read_parts(nvml: Nvml, device: Device, first_part: int) -> None:
    """Read the MIG instances of a device and number them from ``first_part``."""
    parent = str(nvml.query("nvmlDeviceGetName", device.handle))
    parent_uuid = str(nvml.query("nvmlDeviceGetUUID", device.handle))
    count = nvml.query("nvmlDeviceGetMaxMigDeviceCount", device.handle)
    instances: dict[int, int] = {}
    for slot in range(int(count) if answered(count) else 0):
        handle = nvml.query("nvmlDeviceGetMigDeviceHandleByIndex", device.handle, slot)
        if not answered(handle):
            continue
        index = first_part + len(device.gpus)
        gpu, warnings = _read_gpu(nvml, index, handle)
        device.gpus.append(_part(nvml, device.handle, handle, gpu, parent))
        device.warnings += warnings
        instance = nvml.query("nvmlDeviceGetGpuInstanceId", handle)
        compute = nvml.query("nvmlDeviceGetComputeInstanceId", handle)
        device.ids |= {gpu.uuid: index, f"MIG-{parent_uuid}/{instance}/{compute}": index}
        first = instances.setdefault(instance, index) if answered(instance) else index
        if first == index:
            device.default.append(index)
        else:
            device.warnings.append(
                f"GPUs {first} and {index} are compute instances that share one memory: turbofit "
                f"plans only with GPU {first}"
            )
    if not device.gpus:
        device.warnings.append(
            f"GPU {device.index} ({parent}) is in MIG mode and has no instance: CUDA cannot use "
            "the GPU"
        )


def _part(nvml: Nvml, parent: Any, handle: Any, gpu: Gpu, parent_name: str) -> Gpu:
    """Return a MIG instance, with its share of the figures in the whole GPU's preset."""
    attributes = nvml.query("nvmlDeviceGetAttributes", handle)
    read = answered(attributes)
    whole = _memory(nvml, parent)
    capability = nvml.query("nvmlDeviceGetCudaComputeCapability", parent)
    part = replace(
        gpu,
        name=gpu.name if "MIG" in gpu.name else f"{parent_name} MIG",
        mig=True,
        sm_count=int(attributes.multiprocessorCount) if read else NA,
        compute_capability=gpu.compute_capability
        if gpu.compute_capability != NA or not answered(capability)
        else (int(capability[0]), int(capability[1])),
    )
    preset = match_preset(replace(part, name=parent_name, total=whole["total"], mig=False))
    return part if preset is None else share_of(preset, part, known(whole["total"], preset.total))
