"""Machines as files: ``turbofit machine --save FILE`` and ``--on FILE``."""

from __future__ import annotations

import os
import stat
from typing import Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.machine import MACHINE_SCHEMA, Gpu, Machine, Measured
from turbofit.core.process.files import write_output
from turbofit.core.struct import NA, Struct, decode, to_json

#: A machine with 64 GPUs and all its links is below 1 MiB; more is not a snapshot.
_LARGEST: Final = 16 << 20
_LARGEST_SIZE: Final = 1 << 50
#: More than any PCIe link has lanes, and than there are generations.
_MOST_PCIE: Final = 64
#: Without O_NONBLOCK a pipe that nobody writes to would be waited for; Windows has no such flag,
#: but reads a file as text without O_BINARY.
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_HINT: Final = "write one with turbofit machine --save FILE"


class _Schema(Struct):
    schema: str = "none"


def save_snapshot(machine: Machine, path: str | os.PathLike[str]) -> None:
    """Write the machine: a file whole or not at all, a pipe or a device as it is.

    Raises:
        UsageError: the file cannot be written.
    """
    write_output(os.fspath(path), to_json(machine))


def load_snapshot(path: str | os.PathLike[str]) -> Machine:
    """Read a machine back; its ``source`` names the file.

    Raises:
        UsageError: no such file, another schema, or not a possible machine.
    """
    name = os.path.expanduser(path)
    data = _bytes(name)
    what = f"snapshot {name}"
    schema = decode(data, _Schema, what=what).schema
    if schema != MACHINE_SCHEMA:
        raise UsageError(
            f"{what} has schema {schema[:60]!r}; this turbofit reads {MACHINE_SCHEMA!r}", hint=_HINT
        )
    machine = decode(data, Machine, what=what)
    check_possible(machine, what)
    visible = machine.visible or tuple(gpu.index for gpu in machine.gpus)
    return msgspec.structs.replace(machine, source=f"snapshot {name}", visible=visible)


def check_possible(machine: Machine, what: str) -> None:
    """Refuse a machine from a file that no machine can be like; ``what`` names it.

    Raises:
        UsageError: with what is impossible.
    """
    cause = _impossible(machine)
    if cause:
        raise UsageError(f"{what} is not a possible machine: {cause}", hint=_HINT)


def _bytes(name: str) -> bytes:
    try:
        with open(name, "rb", opener=lambda path, _: os.open(path, _FLAGS)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"snapshot {name} is not a file", hint=_HINT)
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise UsageError(f"snapshot {name} cannot be read: {reason}", hint=_HINT) from None
    if len(data) > _LARGEST:
        raise UsageError(f"snapshot {name} is larger than 16 MiB", hint=_HINT)
    return data


def _impossible(machine: Machine) -> str | None:
    """Why no machine can be like this, or None."""
    indices = [gpu.index for gpu in machine.gpus]
    if not indices:
        return "it has no GPU"
    if len(set(indices)) != len(indices):
        return "two GPUs have one index"
    if len(set(machine.visible)) != len(machine.visible) or set(machine.visible) - set(indices):
        return "visible names GPUs that it does not have"
    for gpu in machine.gpus:
        if cause := _impossible_gpu(gpu):
            return f"GPU {gpu.index} {cause}"
    pairs = [(link.a, link.b) for link in machine.links]
    if len(set(pairs)) != len(pairs) or any(
        a >= b or a not in indices or b not in indices for a, b in pairs
    ):
        return "its links do not join its GPUs"
    measured = machine.measured or Measured(torch="")
    rates = [rate for card in measured.cards for rate in (card.bandwidth, card.flops)]
    rates += [figure for reduce in measured.reduces for figure in (reduce.seconds, reduce.size)]
    if any(rate <= 0 for rate in rates):
        return "its measured speeds are not possible"
    host = (machine.host.ram_total, machine.host.ram_available, machine.host.shm_available)
    if any(size != NA and not 0 <= size <= _LARGEST_SIZE for size in host):
        return "its host memory has no possible size"
    texts = (machine.name, machine.driver, machine.cuda, *machine.warnings)
    return None if all(text.isprintable() for text in texts) else "it has unprintable text"


def _impossible_gpu(gpu: Gpu) -> str | None:
    sizes = (gpu.total, gpu.reserved, gpu.used, gpu.free, gpu.l2)
    if gpu.index < 0 or any(size != NA and not 0 <= size <= _LARGEST_SIZE for size in sizes):
        return "has no possible size"
    if not (gpu.total == NA or gpu.free == NA):  # noqa: PLR1714 - mypy narrows by these
        parts = gpu.free + sum(part for part in (gpu.reserved, gpu.used) if part != NA)
        if gpu.total == 0 or parts > gpu.total:
            return "holds more than it has"
    pcie = (gpu.pcie.generation, gpu.pcie.width)
    if any(
        rate != NA and rate <= 0 for rate in (gpu.sm_count, gpu.memory_bandwidth, gpu.dense_flops)
    ) or any(value != NA and not 0 <= value <= _MOST_PCIE for value in pcie):
        return "has no possible speed"
    texts = (gpu.name, gpu.uuid, *(holder.name for holder in gpu.holders))
    return None if all(text.isprintable() for text in texts) else "has an unprintable name"
