"""One NVML device: a whole GPU, or the MIG instances that it is cut into."""

from __future__ import annotations

import os
from typing import Any, Final

import msgspec

from turbofit.core.machine import Gpu, Holder, Pcie
from turbofit.core.struct import NA, NaType, Struct, known
from turbofit.machine.nvml import GpuLostError, Nvml, answered
from turbofit.machine.presets import fill, match_preset, share_of

__all__ = ["UNKNOWN_HOLDER", "Device", "read_device"]

#: The name of what no visible process explains.
UNKNOWN_HOLDER: Final = "unknown (another container?)"
_UNKNOWN_V1: Final = "the driver's own reserve, or unknown (another container?)"

#: CUDA cores of one SM by compute capability (CUDA C++ Programming Guide, arithmetic throughput).
_CORES: Final = {
    (6, 0): 64, (6, 1): 128, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64, (8, 6): 128,
    (8, 7): 128, (8, 9): 128, (9, 0): 128, (10, 0): 128, (10, 3): 128, (12, 0): 128, (12, 1): 128,
}  # fmt: skip
#: The lists of processes; drivers before 510 have version 2 only, which pynvml must be asked for.
_PROCESS_LISTS: Final = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMPSComputeRunningProcesses",
)


class _Sizes(Struct):
    """Bytes of one device's memory."""

    total: int | NaType = NA
    reserved: int | NaType = NA
    used: int | NaType = NA
    free: int | NaType = NA


class Device:
    """What one physical GPU gives: itself (``gpu``), or its MIG instances (``parts``).

    ``default`` are the indices that may be planned with; ``ordinal`` is what CUDA shows for its
    place in the PCI order; ``ids`` are the names that ``CUDA_VISIBLE_DEVICES`` may use.
    """

    def __init__(self, index: int, handle: Any, bus: tuple[int, ...] | None) -> None:
        self.index = index
        self.handle = handle
        self.bus = bus
        self.gpu: Gpu | None = None
        self.parts: list[Gpu] = []
        self.default: tuple[int, ...] = ()
        self.ordinal: int | None = None
        self.ids: dict[str, int] = {}
        self.warnings: list[str] = []

    @property
    def gpus(self) -> list[Gpu]:
        """The GPU or its instances."""
        return [self.gpu] if self.gpu else self.parts


def read_device(
    nvml: Nvml,
    index: int,
    handle: Any,
    bus: tuple[int, ...] | None,
    *,
    first_part: int,
    no_handle: str | None,
) -> Device:
    """Read one device; a lost one becomes a GPU of which nothing is known, and a warning.

    Args:
        nvml: an open NVML.
        index: its place in the PCI order.
        handle: NVML's handle; ``NA`` where there is none.
        bus: its PCI address.
        first_part: the index of its first MIG instance.
        no_handle: why NVML gave none; None where it did.
    """
    device = Device(index, handle, bus)
    try:
        if no_handle is not None:
            raise GpuLostError(no_handle)
        if _mig_enabled(nvml, handle):
            _read_parts(nvml, device, first_part)
        else:
            _take_whole(device, *_read_gpu(nvml, index, handle))
    except GpuLostError as exc:
        device.gpu = _lost_gpu(nvml, index, handle)
        device.parts = []
        device.default = (index,)
        # CUDA may show others in its place, but whoever names this index means this GPU.
        device.ordinal = index
        device.ids = {} if device.gpu.uuid == NA else {device.gpu.uuid: index}
        device.warnings = [f"GPU {index} cannot be read: {exc}"]
    return device


def _take_whole(device: Device, gpu: Gpu, warnings: list[str]) -> None:
    device.gpu = fill(gpu)
    device.default = (device.index,)
    device.ordinal = device.index
    device.ids = {gpu.uuid: device.index}
    device.warnings += warnings


def _lost_gpu(nvml: Nvml, index: int, handle: Any) -> Gpu:
    """Name and UUID of a lost GPU often still answer."""

    def ask(function: str) -> str:
        try:
            return str(nvml.query(function, handle)) if answered(handle) else NA
        except GpuLostError:
            return NA

    name = ask("nvmlDeviceGetName")
    return Gpu(
        index=index,
        uuid=ask("nvmlDeviceGetUUID"),
        name=name if name != NA else "lost GPU",
        total=NA,
        reserved=NA,
        used=NA,
        free=NA,
    )


def _mig_enabled(nvml: Nvml, handle: Any) -> bool:
    mode = nvml.query("nvmlDeviceGetMigMode", handle)
    return answered(mode) and bool(mode[0])


def _read_gpu(nvml: Nvml, index: int, handle: Any) -> tuple[Gpu, list[str]]:
    name = str(nvml.query("nvmlDeviceGetName", handle))
    sizes, version_2 = _memory(nvml, handle)
    warnings = []
    if sizes.total == NA:
        warnings.append(f"GPU {index} ({name}): its memory cannot be read")
    elif not version_2:
        warnings.append(
            f"GPU {index} ({name}): this driver has memory info version 1 only, so what it "
            "reserves for itself is counted as used"
        )
    capability = nvml.query("nvmlDeviceGetCudaComputeCapability", handle)
    cc = (int(capability[0]), int(capability[1])) if answered(capability) else None
    gpu = Gpu(
        index=index,
        uuid=str(nvml.query("nvmlDeviceGetUUID", handle)),
        name=name,
        total=sizes.total,
        reserved=sizes.reserved,
        used=sizes.used,
        free=sizes.free,
        compute_capability=cc or NA,
        sm_count=_sm_count(nvml.query("nvmlDeviceGetNumGpuCores", handle), cc),
        pcie=Pcie(
            generation=nvml.query("nvmlDeviceGetMaxPcieLinkGeneration", handle),
            width=nvml.query("nvmlDeviceGetMaxPcieLinkWidth", handle),
        ),
        holders=_holders(nvml, handle, sizes.used, version_2=version_2),
    )
    return gpu, warnings


def _sm_count(cores: Any, capability: tuple[int, int] | None) -> int | NaType:
    per_sm = _CORES.get(capability) if capability else None
    if not answered(cores) or not cores or per_sm is None or cores % per_sm:
        return NA
    return int(cores) // per_sm


def _memory(nvml: Nvml, handle: Any) -> tuple[_Sizes, bool]:
    """Sizes in bytes that add up, and whether they are of version 2.

    Version 1 counts the driver's reserve as used: ``reserved`` is then unknown, ``free`` is right.
    """
    info, version_2 = nvml.memory(handle)
    if not answered(info) or not info.total or info.free > info.total:
        return _Sizes(), version_2
    total, free = int(info.total), int(info.free)
    used = min(int(info.used), total - free)
    if not version_2:
        return _Sizes(total=total, used=total - free, free=free), False
    return _Sizes(total=total, reserved=total - used - free, used=used, free=free), True


def _holders(nvml: Nvml, handle: Any, used: int | NaType, *, version_2: bool) -> tuple[Holder, ...]:
    """Who holds memory: processes that can be seen, largest first, then the unexplained rest."""
    sizes: dict[int, int | NaType] = {}
    for function in _PROCESS_LISTS:
        processes = nvml.query(function, handle)
        if not answered(processes):
            processes = nvml.query(f"{function}_v2", handle)
        for process in processes if answered(processes) else ():
            size = NA if process.usedGpuMemory is None else int(process.usedGpuMemory)
            sizes[int(process.pid)] = _larger(sizes.get(int(process.pid), NA), size)
    holders = [
        Holder(pid=pid, name=_process_name(nvml, pid), bytes=size) for pid, size in sizes.items()
    ]
    holders.sort(key=lambda holder: (holder.bytes == NA, -_known(holder.bytes), str(holder.pid)))
    rest = _known(used) - sum(_known(size) for size in sizes.values())
    if rest > 0:
        holders.append(
            Holder(pid=NA, name=UNKNOWN_HOLDER if version_2 else _UNKNOWN_V1, bytes=rest)
        )
    return tuple(holders)


def _larger(first: int | NaType, second: int | NaType) -> int | NaType:
    if first == NA:
        return second
    return first if second == NA else max(first, second)


def _known(size: int | NaType) -> int:
    return 0 if size == NA else size


def _process_name(nvml: Nvml, pid: int) -> str:
    """The program's file name; NVML knows processes of other pid namespaces, procfs does not."""
    name = nvml.query("nvmlSystemGetProcessName", pid)
    if not answered(name) or not name:
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                name = file.read().strip()
        except OSError:
            name = ""
    pieces = str(name).split()
    base = os.path.basename(pieces[0]) if pieces else ""
    return "".join(c for c in base if c.isprintable()) or f"process {pid}"


def _read_parts(nvml: Nvml, device: Device, first_part: int) -> None:
    """Read the MIG instances as GPUs of their own, numbered from ``first_part``."""
    parent = str(nvml.query("nvmlDeviceGetName", device.handle))
    parent_uuid = str(nvml.query("nvmlDeviceGetUUID", device.handle))
    count = nvml.query("nvmlDeviceGetMaxMigDeviceCount", device.handle)
    instances: dict[int, int] = {}
    default = []
    for slot in range(int(count) if answered(count) else 0):
        handle = nvml.query("nvmlDeviceGetMigDeviceHandleByIndex", device.handle, slot)
        if not answered(handle):
            continue
        index = first_part + len(device.parts)
        gpu, warnings = _read_gpu(nvml, index, handle)
        device.parts.append(_part(nvml, device.handle, handle, gpu, parent))
        device.warnings += warnings
        instance = nvml.query("nvmlDeviceGetGpuInstanceId", handle)
        compute = nvml.query("nvmlDeviceGetComputeInstanceId", handle)
        device.ids |= {gpu.uuid: index, f"MIG-{parent_uuid}/{instance}/{compute}": index}
        if answered(instance) and instance in instances:
            device.warnings.append(
                f"GPUs {instances[instance]} and {index} are compute instances that share one "
                f"memory: only GPU {instances[instance]} is planned with"
            )
            continue
        if answered(instance):
            instances[instance] = index
        default.append(index)
    device.default = tuple(default)
    device.ordinal = default[0] if default else None
    if not device.parts:
        device.warnings.append(
            f"GPU {device.index} ({parent}) is in MIG mode and has no instance, so CUDA has no use "
            "for it"
        )


def _part(nvml: Nvml, parent: Any, handle: Any, gpu: Gpu, parent_name: str) -> Gpu:
    """A MIG instance with its share of what the preset knows of the whole GPU."""
    attributes = nvml.query("nvmlDeviceGetAttributes", handle)
    read = answered(attributes)
    whole, _ = _memory(nvml, parent)
    capability = nvml.query("nvmlDeviceGetCudaComputeCapability", parent)
    part = msgspec.structs.replace(
        gpu,
        name=gpu.name if "MIG" in gpu.name else f"{parent_name} MIG",
        mig=True,
        sm_count=int(attributes.multiprocessorCount) if read else NA,
        compute_capability=gpu.compute_capability
        if gpu.compute_capability != NA or not answered(capability)
        else (int(capability[0]), int(capability[1])),
    )
    preset = match_preset(
        msgspec.structs.replace(part, name=parent_name, total=whole.total, mig=False)
    )
    return part if preset is None else share_of(preset, part, known(whole.total, preset.total))
