"""Where a machine comes from: measured, a snapshot, or a SPEC."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import MachineError, UsageError
from turbofit.core.machine import Machine
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import NA, known
from turbofit.machine.presets import match_preset
from turbofit.machine.unlisted import vgpu_of
from turbofit.machine.visible import select

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.machine import Gpu

_LOG: Final = LazyLogger(__name__)


def machine_from(
    on: str | Machine | None, *, gpus: str | None = None, environ: Mapping[str, str] | None = None
) -> Machine:
    """The machine to plan for.

    Args:
        on: a SPEC; a snapshot's path where it has a ``/`` or ends in ``.json``; None: this machine,
            through NVML, as far as ``CUDA_VISIBLE_DEVICES`` shows it. A machine is itself, with all
            of its GPUs where it says of none that it is visible.
        gpus: PCI indices or UUIDs among the visible GPUs.
        environ: the environment, by default the process's own.

    Returns:
        A machine whose ``visible`` GPUs all have readable memory.

    Raises:
        UsageError: a SPEC, snapshot or ``--gpus`` that cannot be meant.
        MachineError: no NVML, no GPU, or a needed GPU's memory cannot be read.
        PackageError: nvidia-ml-py is not installed.
    """
    env = os.environ if environ is None else environ
    chosen_by_user = gpus is not None
    if on is None:
        from turbofit.machine.nvml_machine import measure_in_time
        from turbofit.machine.spec import is_spec
        from turbofit.machine.speed import recall

        if gpus is not None and is_spec(gpus):  # before this machine is measured
            hint = f"it is a machine: --on {gpus}; --gpus 0,1 chooses GPUs of one"
            raise UsageError(f"--gpus: {gpus!r} is no GPU of this machine", hint=hint)
        machine = recall(measure_in_time(env))
        chosen_by_user = chosen_by_user or env.get("CUDA_VISIBLE_DEVICES") is not None
    elif isinstance(on, Machine):
        visible = on.visible or tuple(gpu.index for gpu in on.gpus)
        machine = replace(on, visible=visible)
    else:
        from turbofit.machine.snapshot import load_snapshot
        from turbofit.machine.spec import is_pasted, parse_spec

        is_path = on.endswith(".json") or ("/" in on and not is_pasted(on))
        machine = load_snapshot(on) if is_path else parse_spec(on)
    machine = replace(machine, gpus=tuple(map(_accounted, machine.gpus)))
    if gpus is not None:
        if not gpus.strip():
            raise UsageError("--gpus is empty", hint="name GPUs as in --gpus 0,1")
        visible = select(gpus, machine.gpus, machine.visible)
        machine = replace(machine, visible=visible)
    machine = _with_notes(_readable(machine, chosen_by_user=chosen_by_user))
    _LOG.info(
        "machine %s (%s): driver %s, GPUs %s",
        machine.name, machine.source, machine.driver, machine.visible,
    )  # fmt: skip
    for gpu in machine.gpus:
        _LOG.debug(
            "GPU %s %s: %s of %s bytes free, used by %s",
            gpu.index, gpu.name, gpu.free, gpu.total, gpu.holders,
        )  # fmt: skip
    return machine


def _accounted(gpu: Gpu) -> Gpu:
    """The GPU with all that is neither reserved nor free counted as used."""
    if gpu.total == NA or gpu.free == NA:  # noqa: PLR1714 - mypy narrows by these
        return gpu
    used = max(known(gpu.used, 0), gpu.total - known(gpu.reserved, 0) - gpu.free)
    return gpu if used == gpu.used else replace(gpu, used=used)


def _with_notes(machine: Machine) -> Machine:
    """The machine with what its visible GPUs are, where they are not whole cards with a preset.

    Each kind of card once.
    """
    if machine.source == "preset":
        return machine
    gpus = [machine.gpu(index) for index in machine.visible]
    cards = machine.measured.cards if machine.measured else ()
    timed = {card.index for card in cards}
    notes = [_unlisted_note(gpu, timed=gpu.index in timed) for gpu in gpus]
    warnings = dict.fromkeys((*machine.warnings, *(note for note in notes if note)))
    return replace(machine, warnings=tuple(warnings))


def _unlisted_note(gpu: Gpu, *, timed: bool) -> str | None:
    """What is not known of a measured GPU, or that it is a part of one."""
    if match_preset(gpu) is not None:
        return None
    names = ["sm_count", "compute_capability", "l2"]
    names += [] if timed else ["memory_bandwidth", "dense_flops"]
    lacking = [name.replace("_", " ") for name in names if getattr(gpu, name) == NA]
    what = "has no preset" if lacking else ""
    if gpu.mig:
        what = f"is a MIG slice with {gpu.sm_count} SMs, on which one engine runs"
    elif vgpu_of(gpu.name):
        what = "is a vGPU, which shares its card's time with others"
    if lacking:
        what += (
            f"; not known are its {', '.join(lacking)}, which count in memory as the most of all"
            " cards and in speed as a slow card: turbofit machine --measure"
        )
    return f"{gpu.name} {what}" if what else None


def _readable(machine: Machine, *, chosen_by_user: bool) -> Machine:
    """Leave out GPUs whose memory nobody can read, unless the user asked for them."""
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
            hint=f"leave it out with --gpus {','.join(str(i) for i in rest)}"
            if rest
            else "check nvidia-smi, or describe the machine with --on SPEC",
        )
    return replace(machine, visible=rest)
