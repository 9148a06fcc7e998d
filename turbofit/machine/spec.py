"""``--on SPEC``: a machine in one line.

Groups joined by ``+``, then machine options after commas::

    [Nx]NAME[:key=value]…   total, used, free (of used and free one is enough); NAMExN and N NAME
                            mean the same
    ,nvlink=0-1+2-3         the pairs that NVLink joins (none: no pair)
    ,p2p=none|all           peer access between all pairs
    ,ram=64GiB              host memory

GPUs are numbered in the order of the line.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NoReturn

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu, Holder, Host, Machine, Pcie
from turbofit.core.struct import NA, NaType, Struct
from turbofit.core.units import format_bytes, parse_bytes
from turbofit.machine.links import preset_links
from turbofit.machine.presets import (
    GpuPreset,
    assumed_note,
    find_preset,
    load_preset,
    nearest_names,
    preset_names,
)

__all__ = ["MAX_GPUS", "parse_spec"]

#: More GPUs than any one machine has: beyond it a SPEC is a typing error.
MAX_GPUS: Final = 64

_EXAMPLE: Final = "write it like 4xrtx3090, 1xl4:free=19GiB or 4xrtx3090,nvlink=0-1+2-3"
_COUNT: Final = re.compile(r"(\d+)\s*[x×*]\s*(.+)", re.IGNORECASE | re.DOTALL)
#: Where the name alone is a card's: ``4 RTX 3090``, ``3090x4``.
_COUNT_BEFORE: Final = re.compile(r"(\d+)\s+(.+)", re.DOTALL)
_COUNT_BEHIND: Final = re.compile(r"(?P<name>.+?)\s*[x×*]\s*(?P<count>\d+)", re.IGNORECASE)
_PAIR: Final = re.compile(r"\s*(\d{1,3})\s*-\s*(\d{1,3})\s*")
_SIZES: Final = ("total", "used", "free")
_OPTIONS: Final = ("nvlink", "p2p", "ram")


class _Group(Struct):
    """``count`` equal GPUs, sizes in bytes."""

    count: int
    preset: GpuPreset
    total: int
    reserved: int
    used: int
    free: int


def parse_spec(spec: str) -> Machine:
    """Build the machine that a SPEC describes.

    A given ``total`` is what CUDA can hand out, so nothing is reserved then.

    Raises:
        UsageError: a name, key, size or pair that cannot be meant; the hint has the nearest one.
    """
    if not spec.strip():
        _refuse("it is empty", _EXAMPLE)
    head, *tail = spec.split(",")
    groups, warnings = [], []
    for text in head.split("+"):
        group, note = _parse_group(text)
        groups.append(group)
        if note:
            warnings.append(note)
    presets = [group.preset for group in groups for _ in range(group.count)]
    if len(presets) > MAX_GPUS:
        _refuse(f"{len(presets)} GPUs", f"one machine has at most {MAX_GPUS}")
    _refuse_cards(head, tail)
    options = _key_values(tail, _OPTIONS, "machine option")
    joined = _parse_pairs(options["nvlink"], presets) if "nvlink" in options else None
    peers = _parse_p2p(options["p2p"]) if "p2p" in options else None
    if peers == "none" and joined:
        _refuse("p2p=none contradicts nvlink: NVLinked GPUs are peers", "leave out one of the two")
    return Machine(
        name=" ".join(spec.split()),
        source="preset",
        gpus=_gpus(groups),
        links=preset_links(presets, nvlink=joined, p2p=peers),
        host=_host(options.get("ram")),
        visible=tuple(range(len(presets))),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _parse_group(text: str) -> tuple[_Group, str | None]:
    head, *tail = text.split(":")
    count, name = _counted(head.strip())
    if len(count) > 3 or not 1 <= int(count) <= MAX_GPUS:
        _refuse(f"{count[:12]}x{name[:40]}: no such group", f"a group has 1 to {MAX_GPUS} GPUs")
    key = find_preset(name)
    if key is None:
        _unknown_gpu(name)
    preset = load_preset(key)
    sizes = {
        size: parse_bytes(value, what=f"{size} of {name}")
        for size, value in _key_values(tail, _SIZES, "key").items()
    }
    return _sized(int(count), preset, name, sizes), assumed_note(name, int(count))


def _counted(text: str) -> tuple[str, str]:
    """How many, and of what: ``4xrtx3090``, ``4 RTX 3090`` or ``3090x4``."""
    if find_preset(text):
        return "1", text
    if (match := _COUNT_BEHIND.fullmatch(text)) and find_preset(match["name"]):
        return match["count"], match["name"]
    if (match := _COUNT_BEFORE.fullmatch(text)) and find_preset(match[2]):
        return match[1], match[2]
    match = _COUNT.fullmatch(text)
    return (match[1], match[2].strip()) if match else ("1", text)


def _refuse_cards(head: str, options: list[str]) -> None:
    """Refuse a comma between cards, where + stands."""
    for option in options:
        if "=" not in option.partition(":")[0] and find_preset(
            _counted(option.partition(":")[0].strip())[1]
        ):
            _refuse(
                f"{option.strip()!r} is not key=value",
                f"cards are joined by +: {'+'.join((head, *map(str.strip, options)))}",
            )


def _sized(count: int, preset: GpuPreset, name: str, sizes: dict[str, int]) -> _Group:
    """Apply ``total``, ``used`` and ``free``."""
    total = sizes.get("total", preset.total)
    reserved = 0 if "total" in sizes else preset.reserved
    usable = total - reserved
    if total == 0:
        _refuse(f"{name} has a total of 0", "give what CUDA can hand out, as in total=23028MiB")
    used, free = sizes.get("used"), sizes.get("free")
    for what, size in (("used", used), ("free", free)):
        if size is not None and size > usable:
            _refuse(
                f"{name}: {what}={format_bytes(size)} is more than the {format_bytes(usable)} that "
                "CUDA can hand out",
                f"lower {what}, or give the total as well",
            )
    if used is not None and free is not None and used + free != usable:
        _refuse(
            f"{name}: used {format_bytes(used)} and free {format_bytes(free)} do not add up to "
            f"{format_bytes(usable)} ({usable} bytes)",
            "give only one of used and free",
        )
    if free is None:
        free = usable - (used or 0)
    return _Group(
        count=count, preset=preset, total=total, reserved=reserved, used=usable - free, free=free
    )


def _gpus(groups: list[_Group]) -> tuple[Gpu, ...]:
    gpus: list[Gpu] = []
    for group in groups:
        preset = group.preset
        holders = (Holder(pid=NA, name="given in SPEC", bytes=group.used),) if group.used else ()
        for _ in range(group.count):
            index = len(gpus)
            gpus.append(
                Gpu(
                    index=index,
                    uuid=f"preset-{index}",
                    name=preset.name,
                    total=group.total,
                    reserved=group.reserved,
                    used=group.used,
                    free=group.free,
                    compute_capability=preset.compute_capability.value,
                    sm_count=preset.sm_count.value,
                    l2=preset.l2.value,
                    memory_bandwidth=preset.memory_bandwidth.value,
                    dense_flops=preset.dense_flops.value,
                    pcie=Pcie(generation=preset.pcie.generation, width=preset.pcie.width),
                    holders=holders,
                )
            )
    return tuple(gpus)


def _key_values(parts: list[str], known: tuple[str, ...], what: str) -> dict[str, str]:
    """``key=value`` parts as a dict; each key once, and only known ones."""
    found: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if not equals or not value.strip():
            _refuse(f"{part.strip()!r} is not key=value", f"{what}s are {', '.join(known)}")
        if key not in known:
            _refuse(f"unknown {what} {key!r}", f"known are {', '.join(known)}")
        if key in found:
            _refuse(f"{key} is given twice", f"give {key} once")
        found[key] = value.strip()
    return found


def _parse_pairs(text: str, presets: list[GpuPreset]) -> frozenset[tuple[int, int]]:
    if text.lower() == "none":
        return frozenset()
    pairs = set()
    for part in text.split("+"):
        match = _PAIR.fullmatch(part)
        if not match:
            _refuse(f"nvlink: {part.strip()!r} is not a pair", "write it like nvlink=0-1+2-3")
        a, b = sorted((int(match[1]), int(match[2])))
        if a == b or b >= len(presets):
            _refuse(
                f"nvlink: {part.strip()} does not join two of the {len(presets)} GPUs",
                f"GPUs are numbered from 0 to {len(presets) - 1} in the order of the SPEC",
            )
        if (a, b) in pairs:
            _refuse(f"nvlink: {a}-{b} is there twice", "name each pair once")
        for index in (a, b):
            if presets[index].nvlink.lanes == 0:
                _refuse(
                    f"nvlink: GPU {index} ({presets[index].name}) has no NVLink",
                    "leave the pair out",
                )
        pairs.add((a, b))
    return frozenset(pairs)


def _parse_p2p(text: str) -> Literal["none", "all"]:
    if text.lower() not in ("none", "all"):
        _refuse(f"p2p={text}", "p2p is none or all")
    return "none" if text.lower() == "none" else "all"


def _host(ram: str | None) -> Host:
    """Nothing is known of a described host but the memory that was given, taken as available."""
    size: int | NaType = NA if ram is None else parse_bytes(ram, what="ram")
    return Host(ram_total=size, ram_available=size)


def _unknown_gpu(name: str) -> NoReturn:
    if not name:
        _refuse("a group has no GPU name", _EXAMPLE)
    from turbofit.machine.unsupported import unsupported_card

    row = unsupported_card(name[:60])
    if row is not None:
        raise UsageError(f"{name[:60]} is {row.card}: {row.why}", hint=row.instead)
    near = nearest_names(name[:60])
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(preset_names())}"
    raise UsageError(f"no GPU preset is called {name[:60]!r}", hint=hint)


def _refuse(cause: str, hint: str) -> NoReturn:
    raise UsageError(f"SPEC: {cause}", hint=hint)
