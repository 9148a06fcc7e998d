"""The cards: who sees them, who holds them, and in what condition they are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import indices, plural
from turbofit.core.struct import NA
from turbofit.core.units import GIB, format_bytes
from turbofit.diagnose.doctor.finding import Finding, ok, stops, unreadable, warning
from turbofit.diagnose.doctor.health import ABSENT, Health

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.core.machine import Machine
    from turbofit.diagnose.doctor.sources import Sources

__all__ = ["condition_findings", "gpu_findings", "xid_finding"]

#: Less free memory than this serves nothing: a context and the smallest vision model's weights.
_LEAST: Final = 2 * GIB
_HELD: Final = GIB // 2
#: NVML's clock event reasons that mean heat or power trouble: HW slow-down, software thermal,
#: hardware thermal, power brake.
_HOT: Final = 0x08 | 0x20 | 0x40 | 0x80
_XID: Final = re.compile(r"Xid \(([^)]*)\): (\d+)")
#: Xids of hardware, link and memory (NVIDIA's Xid catalogue); others come from programs.
_HARD_XIDS: Final = frozenset((48, 62, 63, 64, 74, 79, 92, 94, 95, 109, 110, 119, 120))


def gpu_findings(sources: Sources, machine: Machine) -> Iterator[Finding]:
    """What the machine's own description tells."""
    yield _unreadable(machine)
    yield _visible(sources, machine)
    yield _holders(machine)
    yield _free(machine)
    yield _mig(machine)


def _unreadable(machine: Machine) -> Finding:
    check = "gpus"
    unreadable = [gpu.index for gpu in machine.gpus if gpu.total == NA]
    if unreadable:
        told = "; ".join(line for line in machine.warnings if "cannot be read" in line)
        return stops(
            check,
            f"GPU {indices(unreadable)} of {len(machine.gpus)} cannot be read: {told}".rstrip(": "),
            "an engine that is given such a GPU fails or hangs",
            "look at dmesg for Xid lines and restart the machine, or leave it out with --gpus",
        )
    return ok(check, f"{len(machine.gpus)} {plural(len(machine.gpus), 'GPU')}: {machine.name}")


def _visible(sources: Sources, machine: Machine) -> Finding:
    """NVML sees all GPUs, a CUDA program those of CUDA_VISIBLE_DEVICES in its own order."""
    check = "cuda_visible_devices"
    value = sources.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = [gpu.index for gpu in machine.gpus if gpu.index not in machine.visible]
    told = [line for line in machine.warnings if "CUDA_VISIBLE_DEVICES" in line]
    if not machine.visible:
        return stops(
            check,
            told[0] if told else f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU",
            "a CUDA program sees no GPU, whatever nvidia-smi shows",
            "unset or correct CUDA_VISIBLE_DEVICES",
        )
    if told:
        return warning(
            check,
            told[0],
            "an engine would run on other cards than the ones meant",
            "name GPUs by UUID, or set CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    if hidden and value is not None:
        return warning(
            check,
            f"GPU {indices(hidden)} hidden by CUDA_VISIBLE_DEVICES={value}",
            f"only {len(machine.visible)} of {len(machine.gpus)} GPUs can be used",
            "unset it if that is not meant",
        )
    return ok(check, f"{len(machine.visible)} of {len(machine.gpus)} GPUs visible to CUDA")


def _holders(machine: Machine) -> Finding:
    check = "holders"
    gpus = [machine.gpu(index) for index in machine.visible]
    unread = [gpu.index for gpu in gpus if gpu.used == NA]
    if unread or not gpus:
        return unreadable(
            check, f"who holds GPU {indices(unread)}", "memory of others is not there for a plan"
        )
    told = []
    for gpu in gpus:
        told += [
            f"GPU {gpu.index}: {holder.name}"
            + (f"[{holder.pid}]" if holder.pid != NA else "")
            + f" {'an unknown amount' if holder.bytes == NA else format_bytes(holder.bytes)}"
            for holder in gpu.holders
            if holder.bytes == NA or holder.bytes >= _HELD
        ]
        if not gpu.holders and gpu.used != NA and gpu.used >= _HELD:
            told.append(f"GPU {gpu.index}: nobody that can be seen {format_bytes(gpu.used)}")
    if told:
        return warning(
            check,
            "; ".join(told),
            "plans leave it to them; if they grow, the engine dies. What no visible process"
            " explains is another container, or a notebook of another user",
            "end what is not needed (kill PID, or the notebook's kernel); see `turbofit machine`",
        )
    return ok(check, "nobody holds half a GiB or more")


def _free(machine: Machine) -> Finding:
    check = "free_memory"
    gpus = [machine.gpu(index) for index in machine.visible]
    sizes = {gpu.index: gpu.free for gpu in gpus if gpu.free != NA}
    if not sizes:
        return unreadable(check, "free memory", "nothing can be planned without it")
    seen = ", ".join(f"GPU {index} {format_bytes(size)}" for index, size in sizes.items())
    if all(size < _LEAST for size in sizes.values()):
        return stops(
            check,
            f"free: {seen}",
            "no vision-language model fits into that beside its CUDA context",
            "end what holds the cards, see the finding `holders`",
        )
    if any(size < _LEAST for size in sizes.values()):
        return warning(
            check,
            f"free: {seen}",
            "a group of cards can use only what its fullest card has",
            "leave full cards out with --gpus",
        )
    return ok(check, f"free: {seen}")


def _mig(machine: Machine) -> Finding:
    check = "mig"
    empty = [line for line in machine.warnings if "MIG mode and has no instance" in line]
    if empty:
        return stops(
            check,
            "; ".join(empty),
            "CUDA cannot use such a GPU at all",
            "nvidia-smi mig -cgi …, or nvidia-smi -mig 0",
        )
    parts = [gpu.index for gpu in machine.gpus if gpu.mig]
    if parts:
        return warning(
            check,
            f"GPU {indices(parts)} are MIG instances",
            "instances have no peer access and a CUDA process sees one of them: tp 1 only",
            "one replica an instance; nvidia-smi -mig 0 for whole cards",
        )
    return ok(check, "no GPU is cut into instances")


def condition_findings(machine: Machine, healths: Sequence[Health]) -> Iterator[Finding]:
    """Link, power, heat and memory errors of each card."""
    if not healths:
        for check, why in (
            ("pcie", "a slot with fewer lanes slows loading and every all-reduce"),
            ("persistence", "without it the driver may unload between programs"),
            ("ecc", "memory errors end engines and may falsify answers"),
            ("thermal", "a hot card serves slower"),
        ):
            yield unreadable(check, "not measured on this machine", why)
        return
    yield _pcie(machine, healths)
    yield _persistence(healths)
    yield _ecc(healths)
    yield _thermal(healths)


def _pcie(machine: Machine, healths: Sequence[Health]) -> Finding:
    """Links narrower than the slot allows; slower ones only where the card is not idle."""
    check = "pcie"
    why = "a link with fewer lanes slows loading and, without NVLink, every all-reduce of tp"
    narrow, slow, unread = [], [], []
    for health in healths:
        gpu = machine.gpu(health.index)
        width, generation = health.pcie_width, health.pcie_generation
        if NA in (width, generation, gpu.pcie.width, gpu.pcie.generation):
            unread.append(gpu.index)
            continue
        if width < gpu.pcie.width:  # type: ignore[operator]
            narrow.append(f"GPU {gpu.index} x{width} of x{gpu.pcie.width}")
        elif generation < gpu.pcie.generation and health.idle is False:  # type: ignore[operator]
            slow.append(f"GPU {gpu.index} generation {generation} of {gpu.pcie.generation}")
    if narrow or slow:
        return warning(
            check,
            "; ".join(narrow + slow),
            why,
            "reseat the card, or use the slot with all lanes; look for a riser or an M.2 disk that"
            " shares its lanes",
        )
    if unread:
        return unreadable(check, f"the link of GPU {indices(unread)}", why)
    idle = any(health.idle is not False for health in healths)
    note = " (idle cards lower their generation, not their width)" if idle else ""
    return ok(check, f"all lanes in use{note}")


def _persistence(healths: Sequence[Health]) -> Finding:
    check = "persistence"
    why = "the driver unloads when no program uses the card: the next start takes seconds longer"
    off = [health.index for health in healths if health.persistence is False]
    if off:
        return warning(
            check,
            f"off on GPU {indices(off)}",
            why,
            "sudo nvidia-smi -pm 1, or nvidia-persistenced",
        )
    unread = [health.index for health in healths if health.persistence == NA]
    if unread:
        return unreadable(check, f"the mode of GPU {indices(unread)}", why)
    return ok(check, "on")


def _ecc(healths: Sequence[Health]) -> Finding:
    check = "ecc"
    why = "uncorrectable memory errors end the programs on the card"
    faulty = [health.index for health in healths if health.rows_failed is True]
    if faulty:
        return stops(
            check,
            f"GPU {indices(faulty)} could not remap faulty memory rows",
            why,
            "take the card out of service: it is faulty",
        )
    bad = [
        health.index
        for health in healths
        if isinstance(health.uncorrected, int) and health.uncorrected > 0
    ]
    if bad:
        return warning(
            check,
            f"uncorrected memory errors on GPU {indices(bad)} since the driver was loaded",
            why,
            "restart the machine; if they come again, the card is faulty",
        )
    pending = [health.index for health in healths if health.rows_pending is True]
    if pending:
        return warning(
            check,
            f"GPU {indices(pending)} waits to remap faulty memory rows",
            why,
            "reset the card or restart the machine, so that the rows are replaced",
        )
    unread = [health.index for health in healths if NA in (health.ecc, health.uncorrected)]
    if unread:
        return unreadable(check, f"the error counts of GPU {indices(unread)}", why)
    if all(health.ecc == ABSENT for health in healths):
        return ok(check, "these cards have no ECC")
    off = [health.index for health in healths if health.ecc is False]
    return ok(check, f"no uncorrected errors{f'; ECC off on GPU {indices(off)}' if off else ''}")


def _thermal(healths: Sequence[Health]) -> Finding:
    check, why = "thermal", "a card that is too hot or short of power lowers its clocks: slower"
    hot = [
        f"GPU {health.index}" + ("" if health.temperature == NA else f" at {health.temperature} °C")
        for health in healths
        if isinstance(health.slow, int) and health.slow & _HOT
    ]
    if hot:
        return warning(
            check, f"slowed down now: {', '.join(hot)}", why, "check fans, dust and power cables"
        )
    unread = [health.index for health in healths if health.slow == NA]
    if unread:
        return unreadable(check, f"why GPU {indices(unread)} lowers its clocks", why)
    return ok(check, "no card is slowed down by heat or power")


def xid_finding(sources: Sources) -> Finding:
    """Xid errors in the kernel's log."""
    check, text = "xid", sources.kernel_log()
    why = "the driver reports a failing card, link or memory there before programs feel it"
    if text is None:
        return unreadable(
            check, "the kernel's log", why, "sudo dmesg | grep -i xid (it needs root here)"
        )
    found: dict[str, set[int]] = {}
    for match in _XID.finditer(text):
        found.setdefault(match[1], set()).add(int(match[2]))
    if not found:
        return ok(check, "no Xid in the kernel's log")
    seen = "; ".join(f"{bus}: Xid {', '.join(map(str, sorted(n)))}" for bus, n in found.items())
    hard = any(number in _HARD_XIDS for numbers in found.values() for number in numbers)
    return warning(
        check,
        seen,
        f"{why}; these are {'of the hardware' if hard else 'mostly of programs'}",
        "check power, cooling and seating of the card; restart" if hard else "none, if rare",
    )
