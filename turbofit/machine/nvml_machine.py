"""Measures this machine through NVML."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import NoGpuError
from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.struct import NA, NaType
from turbofit.machine.devices import Device, read_device
from turbofit.machine.driver_calls import ask_driver
from turbofit.machine.host import read_host
from turbofit.machine.links import LaneMap, shared_lanes
from turbofit.machine.nvml import P2P_NVLINK, P2P_READ, P2P_WRITE, GpuLostError, Nvml, answered
from turbofit.machine.presets import match_preset
from turbofit.machine.visible import cuda_visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["measure", "measure_in_time"]

#: nvmlGpuTopologyLevel
_ANCESTOR: Final = {
    0: "internal",
    10: "single",
    20: "multiple",
    30: "hostbridge",
    40: "node",
    50: "system",
}
_P2P_OK: Final = 0
_P2P_UNKNOWN: Final = 6
_SWITCH: Final = 2
#: Seconds to read all GPUs: a driver that nobody keeps loaded is loaded first, some for each.
_LONGEST: Final = 120.0


def measure(environ: Mapping[str, str]) -> Machine:
    """Read GPUs, links and host; ``visible`` is what ``CUDA_VISIBLE_DEVICES`` leaves.

    Raises:
        NoGpuError: no NVML, no GPU, or all hidden.
        PackageError: nvidia-ml-py is not installed.
    """
    with Nvml() as nvml:
        devices, warnings = _devices(nvml)
        links = _links(nvml, devices)
        driver = nvml.query("nvmlSystemGetDriverVersion")
        cuda = _cuda(nvml.query("nvmlSystemGetCudaDriverVersion_v2"))
    visible, notes = _visible(devices, environ)
    gpus = tuple(gpu for device in devices for gpu in device.gpus)
    return Machine(
        name=_name([gpu for gpu in gpus if gpu.index in visible] or gpus),
        source="nvml",
        gpus=tuple(sorted(gpus, key=lambda gpu: gpu.index)),
        links=links,
        host=read_host(),
        driver=str(driver),
        cuda=cuda,
        visible=visible,
        warnings=(*warnings, *notes),
    )


def measure_in_time(environ: Mapping[str, str]) -> Machine:
    """As `measure`, but for a driver that may never answer, as one that has lost a card.

    Raises:
        NoGpuError: as `measure`, or it has not answered for two minutes.
        PackageError: nvidia-ml-py is not installed.
    """
    machine = ask_driver(partial(measure, environ), None, seconds=_LONGEST)
    if machine is None:
        raise NoGpuError(
            f"the NVIDIA driver has not answered for {_LONGEST:g} s",
            hint="look for NVRM and Xid in `sudo dmesg`, and restart the machine; or describe one "
            "with --on SPEC",
        )
    return machine


def _devices(nvml: Nvml) -> tuple[list[Device], list[str]]:
    """All devices in PCI order, and what went wrong."""
    count = nvml.query("nvmlDeviceGetCount")
    if not answered(count) or count < 1:
        raise NoGpuError(
            "NVML sees no GPU",
            hint="check nvidia-smi (in a container: --gpus all), or use --on SPEC",
        )
    handles = [_handle(nvml, index) for index in range(count)]
    if all(bus is not None for _, bus, _ in handles):
        handles.sort(key=lambda entry: entry[1] or ())
    devices: list[Device] = []
    warnings: list[str] = []
    parts = count  # MIG instances are numbered after all whole GPUs
    for index, (handle, bus, reason) in enumerate(handles):
        device = read_device(nvml, index, handle, bus, first_part=parts, no_handle=reason)
        parts += len(device.parts)
        devices.append(device)
        warnings += device.warnings
    return devices, warnings


def _handle(nvml: Nvml, index: int) -> tuple[Any, tuple[int, ...] | None, str | None]:
    """A device's handle, its bus address, and why it cannot be read, as far as there are any."""
    handle: Any = NA
    try:
        handle = nvml.query("nvmlDeviceGetHandleByIndex", index)
        if not answered(handle):
            return NA, None, nvml.reason("nvmlDeviceGetHandleByIndex", index)
        return handle, _address(nvml.query("nvmlDeviceGetPciInfo", handle)), None
    except GpuLostError as exc:
        return handle, None, str(exc)


def _address(pci: Any) -> tuple[int, ...] | None:
    return (pci.domain, pci.bus, pci.device) if answered(pci) else None


def _visible(
    devices: Sequence[Device], environ: Mapping[str, str]
) -> tuple[tuple[int, ...], list[str]]:
    """What CUDA would show, and warnings."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return tuple(index for device in devices for index in device.default), []
    ordinals = [device.ordinal for device in devices if device.ordinal is not None]
    ids = {name: index for device in devices for name, index in device.ids.items()}
    visible, warning = cuda_visible(value, ordinals, ids)
    notes = [warning] if warning else []
    if not visible:
        raise NoGpuError(
            warning or f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU",
            hint="unset or correct CUDA_VISIBLE_DEVICES, or describe a machine with --on SPEC",
        )
    by_index = not value.strip().startswith(("GPU-", "MIG-"))
    names = {device.gpu.name for device in devices if device.gpu}
    if by_index and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and len(names) > 1:
        notes.append(
            f"CUDA_VISIBLE_DEVICES={value} was read in PCI order, but without "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA numbers the fastest GPU first and these differ"
        )
    return visible, notes


def _links(nvml: Nvml, devices: Sequence[Device]) -> tuple[Link, ...]:
    """Between whole GPUs as measured; a MIG instance has no peers."""
    whole = [device for device in devices if device.gpu and answered(device.handle)]
    buses = {device.bus for device in whole if device.bus}
    lanes = {device.index: _lanes(nvml, device, buses) for device in whole}
    links = [
        _link(nvml, first, second, lanes)
        for position, first in enumerate(whole)
        for second in whole[position + 1 :]
    ]
    parts = [gpu.index for device in devices for gpu in device.parts]
    others = [device.index for device in whole] + parts
    for part in parts:
        links += [
            Link(a=other, b=part, p2p_read=False, p2p_write=False, nvlinks=0)
            for other in others
            if other < part
        ]
    return tuple(sorted(links, key=lambda link: (link.a, link.b)))


def _link(nvml: Nvml, first: Device, second: Device, lanes: Mapping[int, LaneMap]) -> Link:
    handles = (first.handle, second.handle)
    try:
        over_nvlink = _p2p(nvml, *handles, P2P_NVLINK)
        read = _both(_p2p(nvml, *handles, P2P_READ), _p2p(nvml, *handles[::-1], P2P_READ))
        write = _both(_p2p(nvml, *handles, P2P_WRITE), _p2p(nvml, *handles[::-1], P2P_WRITE))
        level = nvml.query("nvmlDeviceGetTopologyCommonAncestor", *handles)
    except GpuLostError:
        return Link(a=first.index, b=second.index)
    count = shared_lanes(
        lanes[first.index], lanes[second.index], str(second.bus), over_switch=over_nvlink
    )
    preset = match_preset(first.gpu) if first.gpu else None
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
    status = nvml.query("nvmlDeviceGetP2PStatus", first, second, capability)
    if not answered(status) or status == _P2P_UNKNOWN:
        return NA
    return bool(status == _P2P_OK)


def _both(first: bool | NaType, second: bool | NaType) -> bool | NaType:
    """Peer access must work in both directions; one known "no" is enough for no."""
    if first is False or second is False:
        return False
    return True if first is True and second is True else NA


def _lanes(nvml: Nvml, device: Device, buses: set[tuple[int, ...]]) -> LaneMap:
    """The active lanes of a GPU; a GPU that cannot have any has a readable zero."""
    lanes = LaneMap()
    try:
        for link in range(nvml.max_nvlinks):
            state, absent = nvml.supported("nvmlDeviceGetNvLinkState", device.handle, link)
            if link == 0:
                lanes.readable = absent or answered(state)
            if not answered(state):
                break
            if state:
                _count_lane(nvml, device, link, lanes, buses)
    except GpuLostError:
        lanes.readable = False
    return lanes


def _count_lane(
    nvml: Nvml, device: Device, link: int, lanes: LaneMap, buses: set[tuple[int, ...]]
) -> None:
    address = _address(nvml.query("nvmlDeviceGetNvLinkRemotePciInfo", device.handle, link))
    if address in buses:
        lanes.add(str(address))
        return
    kind = nvml.query("nvmlDeviceGetNvLinkRemoteDeviceType", device.handle, link)
    if kind == _SWITCH or not answered(kind):
        lanes.add(None)


def _cuda(version: Any) -> str:
    return f"{version // 1000}.{version % 1000 // 10}" if answered(version) else NA


def _name(gpus: Sequence[Gpu]) -> str:
    """``2x NVIDIA L4 + NVIDIA A10``, in the order of first appearance."""
    counts: dict[str, int] = {}
    for gpu in gpus:
        counts[gpu.name] = counts.get(gpu.name, 0) + 1
    return " + ".join(f"{n}x {name}" if n > 1 else name for name, n in counts.items())
