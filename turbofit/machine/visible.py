"""Finds the GPUs that a CUDA program sees, the memory limits of slices, and the GPUs of ``--gpus``.

turbofit reads ``CUDA_VISIBLE_DEVICES`` as CUDA does: a list of indices, or of unique prefixes of
UUIDs, or of ids of MIG instances. An invalid entry hides its own GPU and the GPUs of all later
entries. A repeated entry hides all GPUs, and an empty value too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu, Machine
from turbofit.core.struct import NA, known
from turbofit.core.units import GIB, KIB, MIB, format_bytes
from turbofit.machine.presets import find_preset, load_preset

_NUMBER = re.compile(r"[+-]?\d{1,9}")
_LIMIT: Final = "CUDA_DEVICE_MEMORY_LIMIT"
#: The variable with the UUID of each limit's GPU, if the device plugin sets the variable:
#: ``0:GPU-5c1f… 1:GPU-…``.
_DEVICE_MAP: Final = "NVIDIA_DEVICE_MAP"
#: A limit as HAMi-core reads it: bytes, or a number with a letter for its unit.
_SIZE: Final = re.compile(r"(\d+)([kmg]?)b?", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB}
#: If NVML's total exceeds the limit by at most this rounding, NVML reports the slice, not the card.
_ROUNDING: Final = 16 * MIB


def cuda_visible(
    value: str, ordinals: Sequence[int], ids: Mapping[str, int]
) -> tuple[tuple[int, ...], str | None]:
    """Return the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, and a warning if an entry hides some.

    Args:
        value: the variable.
        ordinals: GPU index of each CUDA ordinal.
        ids: GPU index by UUID (``GPU-…``, ``MIG-…``).
    """
    entries = [entry.strip() for entry in value.split(",")]
    if entries == [""]:
        return (), None
    # All entries must have the form of the first one.
    kind = next((kind for kind in ("GPU-", "MIG-") if entries[0].startswith(kind)), "")
    chosen: list[int] = []
    for position, entry in enumerate(entries):
        index = _resolve(entry, kind, ordinals, ids)
        if index is None:
            hidden = ",".join(entries[position:])
            return tuple(chosen), (
                f"CUDA_VISIBLE_DEVICES: {entry!r} is not a GPU of this machine, and CUDA ignores "
                f"this entry and all later ones ({hidden!r})"
            )
        if index in chosen:
            return (), f"CUDA_VISIBLE_DEVICES: {entry!r} is there twice, and CUDA then sees no GPU"
        chosen.append(index)
    return tuple(chosen), None


def select(gpus: str, machine_gpus: Sequence[Gpu], visible: Sequence[int]) -> tuple[int, ...]:
    """Return the GPUs that ``--gpus`` names, in the order of the option.

    An entry is a PCI index, a UUID, or the beginning of a UUID. ``all`` means all visible GPUs, as
    for Docker.

    Raises:
        UsageError: an entry names no GPU of this machine, a hidden GPU, or the same GPU twice.
    """
    if gpus.strip().lower() == "all":
        return tuple(visible)
    visible_words = f"visible are {', '.join(str(i) for i in visible) or 'none'}"
    chosen: list[int] = []
    for raw in gpus.split(","):
        entry = raw.strip()
        index = _named(entry, machine_gpus)
        if index is None:
            raise UsageError(
                f"`--gpus`: {entry!r} is not one GPU of this machine",
                hint=f"{visible_words}; write the number of described GPUs in `--on`, as in"
                " 2xrtx3090",
            )
        if index in chosen:
            raise UsageError(f"`--gpus`: GPU {index} is there twice", hint="name each GPU once")
        if index not in visible:
            cause = f"`--gpus`: GPU {index} is hidden by CUDA_VISIBLE_DEVICES"
            raise UsageError(cause, hint=visible_words)
        chosen.append(index)
    return tuple(chosen)


def _resolve(entry: str, kind: str, ordinals: Sequence[int], ids: Mapping[str, int]) -> int | None:
    """Return the index of the GPU that an entry of ``CUDA_VISIBLE_DEVICES`` names, or None.

    ``kind`` is the beginning of all entries, ``GPU-`` or ``MIG-``; if empty, entries are ordinals.
    """
    if kind:
        return _by_prefix(entry, ids) if entry.startswith(kind) else None
    match = _NUMBER.match(entry)
    # CUDA reads the leading digits, and ignores the rest of the entry.
    number = int(match[0]) if match else -1
    return ordinals[number] if 0 <= number < len(ordinals) else None


def _by_prefix(entry: str, ids: Mapping[str, int]) -> int | None:
    """Return the index of the only id that equals or begins with the entry; None if not unique."""
    wanted = entry.lower()
    begin = {index for name, index in ids.items() if name.lower().startswith(wanted)}
    matches = {index for name, index in ids.items() if name.lower() == wanted} or begin
    return matches.pop() if len(matches) == 1 else None


def _named(entry: str, gpus: Sequence[Gpu]) -> int | None:
    """Return the GPU of an entry of ``--gpus``: an index, or the beginning of a UUID; or None."""
    if entry.isascii() and entry.isdigit():
        return next(
            (gpu.index for gpu in gpus if str(gpu.index) == (entry.lstrip("0") or "0")), None
        )
    if len(entry) < 5:
        return None
    return _by_prefix(entry, {gpu.uuid: gpu.index for gpu in gpus})


def held_to_slices(machine: Machine, environ: Mapping[str, str]) -> Machine:
    """Return the machine with the memory limits that environment variables set on its cards.

    The machine gets a warning for each limited card.

    HAMi and Volcano preload the library HAMi-core into a pod's processes, where NVML and CUDA then
    report the slice. TurboMind's C++ code bypasses the library and sees the whole card
    (HAMi-core#74). Its share of free memory would include the memory of other pods. The plan
    therefore treats the limit as a budget of the card, and computes the share from the whole card.
    """
    limits = slice_limits(machine.gpus, machine.visible, environ)
    if not limits:
        return machine
    gpus = tuple(_limited(gpu, limits.get(gpu.index)) for gpu in machine.gpus)
    notes = [
        _note(machine.gpu(gpu.index), gpu, limits[gpu.index]) for gpu in gpus if gpu.index in limits
    ]
    return replace(machine, gpus=gpus, warnings=(*machine.warnings, *dict.fromkeys(notes)))


def slice_limits(
    gpus: Sequence[Gpu], visible: Sequence[int], environ: Mapping[str, str]
) -> dict[int, int]:
    """Return the limit in bytes that the environment sets for each limited GPU, by its index.

    A limit of 0 counts as no limit. The number in a limit's variable is a position among the
    visible GPUs. If ``NVIDIA_DEVICE_MAP`` gives a UUID for the number, the limit is that GPU's.
    """
    uuids = dict(re.findall(r"(\d+):(\S+)", environ.get(_DEVICE_MAP, "")))
    by_uuid, found = {gpu.uuid: gpu.index for gpu in gpus}, {}
    for place, index in enumerate(visible):
        # A card's own limit wins over the limit of all cards.
        if size := _size(environ.get(_LIMIT, "")):
            found[index] = size
        if (of_card := _size(environ.get(f"{_LIMIT}_{place}", ""))) and str(place) not in uuids:
            found[index] = of_card
    for place, uuid in uuids.items():
        if (of_card := _size(environ.get(f"{_LIMIT}_{place}", ""))) and uuid in by_uuid:
            found[by_uuid[uuid]] = of_card
    return found


def _size(text: str) -> int:
    size = _SIZE.fullmatch(text.strip())
    return int(size[1]) * _UNITS[size[2].lower()] if size else 0


def _limited(gpu: Gpu, limit: int | None) -> Gpu:
    """Return the GPU with its limit, and if possible with the memory of the whole card.

    If NVML reports only the slice, the card's preset gives the whole card's memory. The memory of
    other pods is then unknown and counts as free. The share of free memory becomes too small, and
    the engine never exceeds the slice.
    """
    if limit is None or gpu.total == NA:
        return gpu
    key = find_preset(gpu.name)
    if key is not None and known(gpu.total, 0) <= limit + _ROUNDING < load_preset(key).total:
        whole = load_preset(key)
        free = whole.total - whole.reserved - known(gpu.used, 0)
        gpu = replace(gpu, total=whole.total, reserved=whole.reserved, free=free)
    return replace(gpu, limit=limit)


def _note(read: Gpu, gpu: Gpu, limit: int) -> str:
    """Return the warning about a limited card.

    The warning also tells where the figure for the whole card's memory is from.

    ``read`` is the GPU as NVML reports it, ``gpu`` the GPU with its limit.
    """
    text = (
        f"GPU {gpu.index} is a slice of {format_bytes(limit)} (HAMi, Volcano): the plan stays below"
        " this limit, and TurboMind alone would exceed it (HAMi-core#74)"
    )
    if read.total != gpu.total:
        return (
            f"{text}; NVML reports the slice, and the card's name gives the whole card's"
            f" {format_bytes(gpu.usable)}; the memory of other pods is unknown, and makes the cache"
            " smaller than planned"
        )
    if known(gpu.total, 0) <= limit + _ROUNDING:
        return (
            f"{text}; NVML reports the slice, and no preset has the card's size: give the size with"
            f" --on NAME:total=SIZE, and the slice with --budget {limit // MIB}MiB"
        )
    return text
