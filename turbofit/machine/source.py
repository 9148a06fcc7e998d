"""The machine to plan for: this machine, a SPEC, or a snapshot (``turbofit machine --save``)."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import MachineError, UsageError
from turbofit.core.machine import MACHINE_SCHEMA, Gpu, Machine
from turbofit.core.process.files import write_output
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import NA, Struct, decode, known, to_json
from turbofit.core.units import MIB
from turbofit.machine.presets import match_key, match_preset
from turbofit.machine.unlisted import is_vgpu, slow_card
from turbofit.machine.visible import select

_LOG: Final = LazyLogger(__name__)
#: The most bytes of a snapshot: 64 GPUs with all their links need less than 1 MiB.
_LARGEST: Final = 16 << 20
_HINT: Final = "write a snapshot with turbofit machine --save FILE"


def machine_from(
    on: str | Machine | None, *, gpus: str | None = None, environ: Mapping[str, str] | None = None
) -> Machine:
    """Return the machine to plan for.

    Args:
        on: a SPEC; a snapshot's path if it has a ``/`` or ends in ``.json``; None: this machine,
          through NVML, as far as ``CUDA_VISIBLE_DEVICES`` shows it; or a `Machine`, whose GPUs
          are all visible if its ``visible`` is empty.
        gpus: PCI indices or UUIDs among the visible GPUs.
        environ: the environment, by default the process's own.

    Returns:
        A machine whose ``visible`` GPUs all have readable memory.

    Raises:
        UsageError: the SPEC, the snapshot or ``--gpus`` is not valid.
        MachineError: no NVML, no GPU, or a needed GPU's memory cannot be read.
    """
    from turbofit.machine.spec import is_spec, parse_spec

    env = os.environ if environ is None else environ
    chosen_by_user = gpus is not None
    if gpus is not None and on is None and is_spec(gpus):
        raise UsageError(
            f"`--gpus {gpus}` names a card", hint=f"`--on {gpus}` is a machine with this card"
        )
    if on is None:
        from turbofit.machine.learned import recall
        from turbofit.machine.nvml_machine import measure_in_time

        machine = recall(measure_in_time(env))
        chosen_by_user = chosen_by_user or env.get("CUDA_VISIBLE_DEVICES") is not None
    elif isinstance(on, Machine):
        visible = on.visible or tuple(gpu.index for gpu in on.gpus)
        machine = replace(on, visible=visible)
    else:
        # A pasted table of nvidia-smi has slashes, too, but also |, unlike a path.
        is_path = on.endswith(".json") or ("/" in on and "|" not in on)
        machine = load_snapshot(on) if is_path else parse_spec(on)
    machine = replace(machine, gpus=tuple(map(_accounted, machine.gpus)))
    if gpus is not None:
        visible = select(gpus, machine.gpus, machine.visible)
        machine = replace(machine, visible=visible)
    machine = _with_notes(_readable(machine, chosen_by_user=chosen_by_user))
    _LOG.info(
        "machine %s (%s): driver %s, GPUs %s",
        machine.name, machine.source, machine.driver, machine.visible,
    )  # fmt: skip
    return machine


def _accounted(gpu: Gpu) -> Gpu:
    """Set ``used`` to all memory that is not reserved or free; fill in a slow card's FLOP/s."""
    if gpu.dense_flops == NA and (slow := slow_card(gpu.name)):
        gpu = replace(gpu, dense_flops=slow.flops)
    if gpu.total == NA or gpu.free == NA:  # noqa: PLR1714 - mypy narrows by these
        return gpu
    used = max(known(gpu.used, 0), gpu.total - known(gpu.reserved, 0) - gpu.free)
    return gpu if used == gpu.used else replace(gpu, used=used)


def _with_notes(machine: Machine) -> Machine:
    """Return the machine with a warning for each visible GPU that has no preset or is slow."""
    if machine.source == "preset":
        return machine
    gpus = [machine.gpu(index) for index in machine.visible]
    cards = machine.measured.cards if machine.measured else ()
    timed = {card.index for card in cards}
    notes = [_unlisted_note(gpu, timed=gpu.index in timed) for gpu in gpus]
    warnings = dict.fromkeys((*machine.warnings, *(note for note in notes if note)))
    return replace(machine, warnings=tuple(warnings))


def _unlisted_note(gpu: Gpu, *, timed: bool) -> str | None:
    """Return the note on a GPU that is only partly known, is slow, or is a part of a card; or None.

    ``timed``: the GPU's bandwidth and FLOP/s were measured, and do not count as unknown.
    """
    if match_preset(gpu) is not None:
        return None
    names = ["sm_count", "compute_capability", "l2"]
    names += [] if timed else ["memory_bandwidth", "dense_flops"]
    lacking = [name.replace("_", " ") for name in names if getattr(gpu, name) == NA]
    slow = slow_card(gpu.name)
    if gpu.mig:
        kind = f"is a MIG slice with {gpu.sm_count} SMs, on which one engine runs"
    elif is_vgpu(gpu.name):
        kind = "is a vGPU, which shares its card's time with others"
    elif slow:
        kind = f"has no preset; it {slow.note}" if lacking else slow.note
    elif lacking:
        kind = "has no preset"
    else:
        return None
    note = f"{gpu.name} {kind}"
    if lacking:
        note += (
            f"; unknown are the card's {', '.join(lacking)}: they count in memory as the most of"
            " all cards, in speed as a slow card; turbofit calibrate measures the card"
        )
    return note


def _readable(machine: Machine, *, chosen_by_user: bool) -> Machine:
    """Leave out GPUs without readable memory; raise an error if the user chose such a GPU."""
    unreadable = [
        index
        for index in machine.visible
        if NA in (machine.gpu(index).total, machine.gpu(index).free)
    ]
    rest = tuple(index for index in machine.visible if index not in unreadable)
    if unreadable and (chosen_by_user or not rest):
        gpu = machine.gpu(unreadable[0])
        raise MachineError(
            f"GPU {gpu.index} ({gpu.name}): its memory cannot be read",
            hint=f"leave the GPU out with `--gpus {','.join(str(i) for i in rest)}`"
            if rest
            else "check nvidia-smi, or describe the machine with `--on SPEC`",
        )
    return replace(machine, visible=rest)


class _Schema(Struct):
    schema: str = "none"


def save_snapshot(machine: Machine, path: str | os.PathLike[str]) -> None:
    """Write the machine: to a file atomically, to a pipe or a device directly."""
    write_output(os.fspath(path), to_json(machine))


def load_snapshot(path: str | os.PathLike[str]) -> Machine:
    """Read a machine from a snapshot; its ``source`` names the file.

    Raises:
        UsageError: the file is not a snapshot, has another schema, or has an impossible machine.
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
    return replace(machine, source=f"snapshot {name}", visible=visible)


def check_possible(machine: Machine, what: str) -> None:
    """Refuse a machine from a file if its figures are impossible; ``what`` names the file.

    Raises:
        UsageError: sizes or links contradict each other.
    """
    if cause := _impossible(machine):
        raise UsageError(f"{what} is not a possible machine: {cause}", hint=_HINT)


def _bytes(name: str) -> bytes:
    try:
        facts = os.stat(name)
        if not stat.S_ISREG(facts.st_mode):  # a read of a pipe would wait
            raise UsageError(f"snapshot {name} is not a file", hint=_HINT)
        if facts.st_size > _LARGEST:
            raise UsageError(f"snapshot {name} is larger than 16 MiB", hint=_HINT)
        return Path(name).read_bytes()
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise UsageError(f"snapshot {name} cannot be read: {reason}", hint=_HINT) from None


def _impossible(machine: Machine) -> str | None:
    """Return the reason why the machine is impossible; None if it is possible."""
    indices = {gpu.index for gpu in machine.gpus}
    pairs = {(link.a, link.b) for link in machine.links}
    visible = set(machine.visible)
    names = [name for gpu in machine.gpus for name in (gpu.name, gpu.uuid)]
    names += [holder.name for gpu in machine.gpus for holder in gpu.holders]
    texts = (machine.name, machine.driver, machine.cuda, *machine.warnings, *names)
    visible_once = len(visible) == len(machine.visible)
    linked_once = len(pairs) == len(machine.links)
    joins_its_own = all(a < b and {a, b} <= indices for a, b in pairs)
    cards = {gpu.name for gpu in machine.gpus}
    calibrations = machine.calibrations
    calibrated_here = all({*calibration.gpus} <= cards for calibration in calibrations)
    impossible_rate = any(
        rate.exceeds(gpu)
        for calibration in calibrations
        if calibration.steps is not None
        for rate in calibration.steps.rates
        for gpu in machine.gpus
        if gpu.name in calibration.gpus
    )
    reasons = {
        "it has no GPU": not indices,
        "two GPUs have one index": len(indices) != len(machine.gpus),
        "visible names GPUs that it does not have": not (visible_once and visible <= indices),
        "its links do not join its GPUs": not (linked_once and joins_its_own),
        "it has a calibration of cards that it does not have": not calibrated_here,
        "it has a calibration with a rate above its card's peak": impossible_rate,
        "a GPU holds more than it has": any(map(_is_overfull, machine.gpus)),
        "it has unprintable text": not all(map(str.isprintable, texts)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_overfull(gpu: Gpu) -> bool:
    parts = known(gpu.free, 0) + known(gpu.reserved, 0) + known(gpu.used, 0)
    return gpu.total == 0 or parts > known(gpu.total, parts)


def spec_of(machine: Machine) -> str:
    """Write the machine as a SPEC: groups of equal cards, with the memory that others hold."""
    groups = []
    for gpu in machine.gpus:
        used = known(gpu.used, 0)
        name = match_key(gpu) or f"{gpu.name}:total={gpu.usable // MIB}MiB"
        groups.append(f"{name}:used={used // MIB}MiB" if used else name)
    return "+".join(f"{len(list(equal))}x{group}" for group, equal in groupby(groups))
