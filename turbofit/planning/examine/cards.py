"""Checks of the cards: visibility, use of memory, errors and links."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import combinations
from typing import Final

from turbofit.core.errors import MachineError, UsageError
from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.messages import counted, indices
from turbofit.core.plan import GpuLedger, Plan
from turbofit.core.struct import NA, known
from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.planning.examine.scene import (
    Answer,
    Scene,
    ok,
    stops,
    unreadable,
    warning,
)

#: Nothing can be served with less free memory: a context and the smallest model need this much.
_LEAST: Final = 2 * GIB
_HELD: Final = GIB // 2


def same_machine(plan: Plan, scene: Scene) -> Answer | None:
    """Check that the plan's GPUs are present, with the free memory that the plan counts on.

    Less free memory is accepted if the plan's margin remains. Links and other GPUs do not matter.
    """
    if scene.machine is None:
        return None
    if plan.machine.source == "preset" and not scene.pretend:
        return stops(
            f"the plan was made for {plan.machine.name}, which is a preset and no machine",
            "plan on the machine itself: turbofit serve MODEL, or turbofit plan without --on",
            error=UsageError,
        )
    present = {gpu.uuid: gpu for gpu in scene.machine.gpus}
    for ledger in plan.ledgers:
        gpu = present.get(ledger.uuid)
        if gpu is None:
            return stops(
                f"GPU {ledger.index} of the plan ({ledger.name}, {ledger.uuid}) is not there",
                "plan again on this machine: turbofit serve MODEL",
                error=MachineError,
            )
        if gpu.free == NA:
            return stops(
                f"the free memory of GPU {gpu.index} cannot be read",
                "see turbofit machine; another driver version may report it",
                error=MachineError,
            )
        lacking = plan.machine.gpu(ledger.index).ours - gpu.ours
        if lacking > max(0, ledger.headroom - ledger.margin):
            return stops(
                f"GPU {gpu.index} is a slice of {format_bytes(gpu.ours)} here, which is"
                f" {format_bytes(lacking)} less than the plan counted on",
                "plan again inside the slice: turbofit serve MODEL",
            )
        missing = ledger.free - gpu.free
        if missing > max(0, ledger.headroom - kept_margin(ledger)):
            return stops(
                f"GPU {gpu.index} has {format_bytes(missing)} less free memory than the plan "
                f"counted on: {who_grew(plan.machine.gpu(ledger.index), gpu, missing)}",
                "stop that process, or plan again: turbofit serve MODEL",
            )
    return ok("as the plan counted on")


def open_margin(gpu: GpuLedger) -> int:
    """Return the bytes of a GPU's margin that nobody may take: at most the default margin."""
    return min(gpu.margin, max(256 * MIB, gpu.total // 100))


def kept_margin(gpu: GpuLedger) -> int:
    """Return the bytes of a GPU's margin that other processes must leave free.

    With a budget, the margin includes bytes that the budget leaves to other processes, so only
    `open_margin` must stay free.
    """
    return open_margin(gpu) if gpu.beyond_budget else gpu.margin


def who_grew(then: Gpu, now: Gpu, missing: int, ours: Collection[int] = ()) -> str:
    """Return a text that names the processes that took memory, at most three, the largest first.

    ``then`` and ``now`` are the GPU before and after. If no process is seen to have taken memory,
    the text names only the ``missing`` bytes. Processes in ``ours`` are left out.
    """
    before = {holder.pid: holder.bytes for holder in then.holders}
    grown: list[tuple[int, str]] = []
    for holder in now.holders:
        if holder.bytes == NA or holder.pid in ours:
            continue
        had = before.get(holder.pid, 0)
        more = holder.bytes - (0 if had == NA else had)
        if more > 0:
            grown.append((more, f"{holder.label} took {format_bytes(more)} on GPU {now.index}"))
    if not grown:
        return f"nobody visible took {format_bytes(missing)} on GPU {now.index}"
    return ", ".join(text for _, text in sorted(grown, reverse=True)[:3])


def gpus(machine: Machine, _: Scene) -> Answer:
    """Check that each GPU can be read."""
    unread = [gpu.index for gpu in machine.gpus if gpu.total == NA]
    if unread:
        text = "; ".join(line for line in machine.warnings if "cannot be read" in line)
        return stops(
            f"GPU {indices(unread)} of {len(machine.gpus)} cannot be read: {text}".rstrip(": "),
            "look at dmesg for Xid lines and restart the machine, or leave the GPU out with --gpus",
        )
    return ok(f"{counted(len(machine.gpus), 'GPU')}: {machine.name}")


def cuda_visible_devices(machine: Machine, scene: Scene) -> Answer:
    """Report the GPUs that CUDA_VISIBLE_DEVICES hides.

    If the variable names a GPU that the machine does not have, this value is reported instead.
    """
    value = scene.sources.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = [gpu.index for gpu in machine.gpus if gpu.index not in machine.visible]
    warnings = [line for line in machine.warnings if "CUDA_VISIBLE_DEVICES" in line]
    if warnings:
        return warning(warnings[0], "name only GPUs of this machine")
    visible = f"{len(machine.visible)} of {counted(len(machine.gpus), 'GPU')}"
    if hidden and value is not None:
        text = f"GPU {indices(hidden)} hidden by CUDA_VISIBLE_DEVICES={value}"
        return warning(text, "unset it if that is not meant", f"only {visible} can be used")
    return ok(f"{visible} visible to CUDA")


def free_memory(machine: Machine, _: Scene) -> Answer:
    """Report the free memory of each card, and the holders of its used memory."""
    cards = [machine.gpu(index) for index in machine.visible]
    unread = [gpu.index for gpu in cards if NA in (gpu.free, gpu.used)]
    if unread or not cards:
        return unreadable(f"the free memory of GPU {indices(unread)}")
    free = ", ".join(f"GPU {gpu.index} {format_bytes(known(gpu.free, 0))}" for gpu in cards)
    held = [
        f"GPU {gpu.index}: {holder.label}"
        f" {'an unknown amount' if holder.bytes == NA else format_bytes(holder.bytes)}"
        for gpu in cards
        for holder in gpu.holders
        if holder.bytes == NA or holder.bytes >= _HELD
    ]
    text = "; ".join((f"free: {free}", *held))
    fix = "end what is not needed (kill PID, or the notebook's kernel), or choose cards by --gpus"
    if all(known(gpu.free, 0) < _LEAST for gpu in cards):
        why = "no vision-language model fits into this memory beside its CUDA context"
        return stops(text, fix, why)
    return warning(text, fix) if held else ok(text)


def slices(machine: Machine, _: Scene) -> Answer | None:
    """Report cards that HAMi, Volcano or MIG divide into slices; None without slices."""
    notes = [line for line in machine.warnings if "is a slice of" in line or "MIG mode" in line]
    parts = [gpu.index for gpu in machine.gpus if gpu.mig]
    if parts:
        notes.append(f"GPU {indices(parts)} are MIG instances: an engine runs on one of them alone")
    fix = "one replica an instance or slice; nvidia-smi -mig 0 makes whole cards"
    return warning("; ".join(notes), fix) if notes else None


def peer_access(machine: Machine, _: Scene) -> Answer:
    """Report which pairs of GPUs have peer access."""
    pairs = [machine.link(a, b) for a, b in combinations(sorted(machine.visible), 2)]
    if not pairs:
        return ok("one GPU: nothing to reach")
    unread = [link for link in pairs if NA in (link.p2p_read, link.p2p_write)]
    none = [link for link in pairs if link not in unread and not link.peers]
    joined = _pairs(link for link in pairs if link.nvlinked)
    if none:
        names = "all pairs" if len(none) == len(pairs) else _pairs(none)
        fix = "replicas where the model fits on one card; `turbofit plan` prefers them"
        fix += f"; NVLink joins {joined}: group those for tp" if joined else ""
        why = (
            "tensor parallelism then goes through host memory: it works and takes no more GPU"
            " memory, but is slower, often slower than one card; cuda-ipc and native do not work"
        )
        return warning(f"no peer access: {names}", fix, why)
    if unread:
        return unreadable(_pairs(unread), "nvidia-smi topo -p2p r")
    over = f", NVLink between {joined}" if joined else ""
    return ok(f"all pairs ({len(pairs)}) reach each other{over}")


def _pairs(links: Iterable[Link]) -> str:
    return ", ".join(f"{link.a}-{link.b}" for link in links)
