"""Slices of HAMi and Volcano: what a pod may take of each card, which TurboMind does not notice.

Their library (HAMi-core) is preloaded into a pod's processes, where it answers NVML and CUDA with
the slice. TurboMind's C++ code walks past it and sees the whole card (HAMi-core#74), so that a
share of free memory would be a share of everybody's. The limit is a budget of the card instead, and
the share one of what the card has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Machine
from turbofit.core.struct import NA, known
from turbofit.core.units import GIB, KIB, MIB, format_bytes
from turbofit.machine.presets import find_preset, load_preset

_LIMIT: Final = "CUDA_DEVICE_MEMORY_LIMIT"
#: ``0:GPU-5c1f… 1:GPU-77ab…``: what a limit's number means, where a device plugin says so.
_DEVICE_MAP: Final = "NVIDIA_DEVICE_MAP"
#: As HAMi-core reads a limit: bytes, or with a letter behind.
_SIZE: Final = re.compile(r"(\d+)([kmg]?)b?", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB}
#: NVML answers with the slice where its total is no further above the limit than rounding goes.
_ROUNDING: Final = 16 * MIB


def held_to_slices(machine: Machine, environ: Mapping[str, str]) -> Machine:
    """The machine with the limits of its environment, and a line about each card that has one."""
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
    """Bytes by GPU index that the environment allows; a limit of 0, or no size, is none.

    A limit's number is the card's place among the visible ones, unless a map names its UUID.
    """
    uuids = dict(re.findall(r"(\d+):(\S+)", environ.get(_DEVICE_MAP, "")))
    by_uuid, found = {gpu.uuid: gpu.index for gpu in gpus}, {}
    for place, index in enumerate(visible):
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
    """The GPU under its limit, and whole where NVML was made to say the limit.

    What other pods hold cannot be read then, so that all the rest counts as free: the share of it
    errs low, and more than the slice is never taken.
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
    """What is held of a card, and where its memory is from."""
    text = (
        f"GPU {gpu.index} is a slice of {format_bytes(limit)} (HAMi, Volcano): the plan stays below"
        " it, which TurboMind by itself does not (HAMi-core#74)"
    )
    if read.total != gpu.total:
        return (
            f"{text}; NVML says the slice, so that the whole card of {format_bytes(gpu.usable)} is"
            " by its name, and what other pods hold is not known: their memory makes the cache"
            " smaller than planned"
        )
    if known(gpu.total, 0) <= limit + _ROUNDING:
        return (
            f"{text}; NVML says no more than the slice, and no preset says how large the card is:"
            f" name it with --on NAME:total=SIZE and --budget {limit // MIB}MiB"
        )
    return text
