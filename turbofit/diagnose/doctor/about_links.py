"""Peer access between cards, and what the host's bridges do to it."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.core.struct import NA
from turbofit.diagnose.doctor.finding import Finding, ok, unreadable, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.machine import Gpu, Machine
    from turbofit.diagnose.doctor.sources import Sources

__all__ = ["link_findings"]

_CONSUMER: Final = ("GeForce", "RTX")
#: PCI Express: extended capabilities begin here; ACS has this id, its control word is at +6.
_EXTENDED: Final = 0x100
_ACS: Final = 0x000D
#: Request and completion redirect, upstream forwarding: peer traffic goes up to the root.
_REDIRECTS: Final = 0x04 | 0x08 | 0x10
_BRIDGE: Final = "0x0604"
_PCI: Final = "sys/bus/pci/devices"


def link_findings(sources: Sources, machine: Machine) -> Iterator[Finding]:
    """Peer access by pair; IOMMU and ACS, which make it lie."""
    yield _peers(machine)
    yield _iommu(sources, machine)
    yield _acs(sources, machine)


def _peers(machine: Machine) -> Finding:
    check = "peer_access"
    pairs = [machine.link(a, b) for a, b in combinations(sorted(machine.visible), 2)]
    if not pairs:
        return ok(check, "one GPU: nothing to reach")
    unread = [link for link in pairs if NA in (link.p2p_read, link.p2p_write)]
    none = [link for link in pairs if link not in unread and not link.peers]
    joined = [link for link in pairs if link.nvlinked]
    if none:
        names = _pairs([(link.a, link.b) for link in none])
        if len(none) == len(pairs):
            names = "all pairs"
        consumer = any(_consumer(machine.gpu(index)) for index in machine.visible)
        why = (
            "tensor parallelism then goes through host memory: it works and takes no more GPU"
            " memory, but is slower, often slower than one card; cuda-ipc and native do not work"
        )
        if consumer:
            why += ". NVIDIA's driver offers GeForce cards peer access over NVLink only"
        fix = "replicas where the model fits on one card; `turbofit plan` prefers them"
        if joined:
            fix += (
                f"; NVLink joins {_pairs([(one.a, one.b) for one in joined])}: group those for tp"
            )
        return warning(check, f"no peer access: {names}", why, fix)
    if unread:
        return unreadable(
            check,
            f"{_pairs([(link.a, link.b) for link in unread])}",
            "without peer access tensor parallelism is slower, and cuda-ipc does not work",
            "nvidia-smi topo -p2p r",
        )
    over = f", NVLink between {_pairs([(one.a, one.b) for one in joined])}" if joined else ""
    return ok(check, f"all pairs ({len(pairs)}) reach each other{over}")


def _consumer(gpu: Gpu) -> bool:
    return any(word in gpu.name for word in _CONSUMER) and "Quadro" not in gpu.name


def _iommu(sources: Sources, machine: Machine) -> Finding:
    """An IOMMU that translates peer traffic breaks what the driver promised."""
    check = "iommu"
    why = (
        "with an IOMMU that translates, peer copies over PCIe may hang or deliver wrong data though"
        " the driver reports peer access"
    )
    if not _peers_over_pcie(machine):
        return ok(check, "no peer access over PCIe that it could disturb")
    groups, line = sources.names("sys/kernel/iommu_groups"), sources.text("proc/cmdline")
    if groups is None:
        return unreadable(check, "/sys/kernel/iommu_groups", why)
    if not groups:
        return ok(check, "no IOMMU is active")
    if line is not None and ("iommu=pt" in line or "iommu.passthrough=1" in line):
        return ok(check, "the IOMMU passes through (iommu=pt)")
    return warning(
        check,
        f"an IOMMU is active ({len(groups)} groups)",
        why,
        "boot with iommu=pt, or set NCCL_P2P_DISABLE=1 if tp > 1 hangs",
    )


def _acs(sources: Sources, machine: Machine) -> Finding:
    """Bridges that send peer traffic up to the root complex."""
    check = "acs"
    why = "ACS sends what one card writes to another up to the root: slower, and it may hang NCCL"
    if not _peers_over_pcie(machine):
        return ok(check, "no peer access over PCIe that it could redirect")
    devices = sources.names(_PCI)
    if devices is None:
        return unreadable(check, f"/{_PCI}", why)
    redirecting, unread = [], 0
    for device in devices:
        if not (sources.text(f"{_PCI}/{device}/class") or "").startswith(_BRIDGE):
            continue
        config = sources.data(f"{_PCI}/{device}/config")
        if config is None or len(config) <= _EXTENDED:
            unread += 1
        elif (acs_control(config) or 0) & _REDIRECTS:
            redirecting.append(device)
    if redirecting:
        return warning(
            check,
            f"ACS redirects at {', '.join(redirecting[:4])}{' …' if len(redirecting) > 4 else ''}",
            why,
            "switch ACS off in the firmware, or for these bridges with setpci (as root)",
        )
    if unread:
        return unreadable(
            check,
            f"{unread} {plural(unread, 'bridge')} unread: root may read them",
            why,
            "run it as root",
        )
    return ok(check, "no bridge redirects peer traffic")


def acs_control(config: bytes) -> int | None:
    """The ACS control word of a device's configuration space; None where it has none."""
    at, seen = _EXTENDED, 0
    while at >= _EXTENDED and at + 8 <= len(config) and seen < 64:
        header = int.from_bytes(config[at : at + 4], "little")
        if header & 0xFFFF == _ACS:
            return int.from_bytes(config[at + 6 : at + 8], "little")
        at, seen = header >> 20, seen + 1
    return None


def _peers_over_pcie(machine: Machine) -> bool:
    return any(
        machine.link(a, b).peers and not machine.link(a, b).nvlinked
        for a, b in combinations(machine.visible, 2)
    )


def _pairs(pairs: list[tuple[int, int]]) -> str:
    return ", ".join(f"{a}-{b}" for a, b in pairs)
