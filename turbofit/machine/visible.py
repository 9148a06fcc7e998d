"""Which GPUs a CUDA program would see, and which of those the user wants.

``CUDA_VISIBLE_DEVICES`` is read as CUDA reads it: indices, unique prefixes of UUIDs, or ids of MIG
instances, one kind at a time; an invalid entry hides itself and all after it; an entry given twice
hides everything; an empty value hides everything.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.machine import Gpu

_NUMBER = re.compile(r"[+-]?\d{1,9}")


def cuda_visible(
    value: str, ordinals: Sequence[int], ids: Mapping[str, int]
) -> tuple[tuple[int, ...], str | None]:
    """The GPUs that a value of ``CUDA_VISIBLE_DEVICES`` leaves, and a warning if entries hide some.

    Args:
        value: the variable.
        ordinals: GPU index of each CUDA ordinal.
        ids: GPU index by UUID (``GPU-…``, ``MIG-…``).
    """
    entries = [entry.strip() for entry in value.split(",")]
    if entries == [""]:
        return (), None
    kind = next((kind for kind in ("GPU-", "MIG-") if entries[0].startswith(kind)), "")
    chosen: list[int] = []
    for position, entry in enumerate(entries):
        index = _resolve(entry, kind, ordinals, ids)
        if index is None:
            hidden = ",".join(entries[position:])
            return tuple(chosen), (
                f"CUDA_VISIBLE_DEVICES: {entry!r} is not a GPU of this machine, and CUDA ignores "
                f"it and all after it ({hidden!r})"
            )
        if index in chosen:
            return (), f"CUDA_VISIBLE_DEVICES: {entry!r} is there twice, and CUDA then sees no GPU"
        chosen.append(index)
    return tuple(chosen), None


def select(gpus: str, machine_gpus: Sequence[Gpu], visible: Sequence[int]) -> tuple[int, ...]:
    """The GPUs that ``--gpus`` names, in its order: PCI indices or UUIDs (unique prefixes too).

    ``all`` means all visible GPUs, as for Docker.

    Raises:
        UsageError: an entry names no GPU of this machine, a hidden one, or one twice.
    """
    if gpus.strip().lower() == "all":
        return tuple(visible)
    known = f"visible are {', '.join(str(i) for i in visible) or 'none'}"
    chosen: list[int] = []
    for raw in gpus.split(","):
        entry = raw.strip()
        index = _named(entry, machine_gpus)
        if index is None:
            raise UsageError(
                f"--gpus: {entry!r} is not one GPU of this machine",
                hint=f"{known}; how many a described machine has stands in --on, as 2xrtx3090",
                options=["gpus", "on"],
            )
        if index in chosen:
            twice = f"--gpus: GPU {index} is there twice"
            raise UsageError(twice, hint="name each GPU once", options=["gpus"])
        if index not in visible:
            hidden = f"--gpus: GPU {index} is hidden by CUDA_VISIBLE_DEVICES"
            raise UsageError(hidden, hint=known, options=["gpus"])
        chosen.append(index)
    return tuple(chosen)


def _resolve(entry: str, kind: str, ordinals: Sequence[int], ids: Mapping[str, int]) -> int | None:
    if kind:
        return _by_prefix(entry, ids) if entry.startswith(kind) else None
    match = _NUMBER.match(entry)
    # CUDA reads leading digits and does not mind what follows them.
    number = int(match[0]) if match else -1
    return ordinals[number] if 0 <= number < len(ordinals) else None


def _by_prefix(entry: str, ids: Mapping[str, int]) -> int | None:
    wanted = entry.lower()
    begin = {index for name, index in ids.items() if name.lower().startswith(wanted)}
    matches = {index for name, index in ids.items() if name.lower() == wanted} or begin
    return matches.pop() if len(matches) == 1 else None


def _named(entry: str, gpus: Sequence[Gpu]) -> int | None:
    if entry.isascii() and entry.isdigit():
        return next(
            (gpu.index for gpu in gpus if str(gpu.index) == (entry.lstrip("0") or "0")), None
        )
    if len(entry) < 5:
        return None
    return _by_prefix(entry, {gpu.uuid: gpu.index for gpu in gpus})
