"""The same request for other machines: with more GPUs, larger cards, or without a process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Final

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Holder, Link
from turbofit.core.messages import indices
from turbofit.core.struct import known
from turbofit.core.units import format_bytes
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.speed.links import link_class

__all__ = ["MORE_GPUS", "larger", "stopped", "with_more_gpus"]

#: The name of a machine that does not exist.
MORE_GPUS: Final = "more of these GPUs"


def with_more_gpus(request: ResolvedRequest) -> Iterator[tuple[str, ResolvedRequest]]:
    """The remedy's words and the changed question, for 2, 4 and 8 of the GPU with most memory free.

    Only counts above those visible, with the links that the visible ones have: NVLink takes memory.
    """
    gpu = max(request.visible, key=lambda one: known(one.free, 0))
    for count in (2, 4, 8):
        if count <= len(request.visible):
            continue
        machine = replace(
            request.machine,
            name=MORE_GPUS,
            gpus=tuple(replace(gpu, index=i, uuid=f"{gpu.uuid}+{i}") for i in range(count)),
            links=_links(request, gpu, count),
            visible=tuple(range(count)),
        )
        yield f"{count} x {gpu.name}", replace(request, machine=machine, tp=None, replicas=None)


def _links(request: ResolvedRequest, gpu: Gpu, count: int) -> tuple[Link, ...]:
    """The visible GPUs' links as often as they go in, and their slowest one between those sets.

    A bridge joins no sets. A GPU alone has the links of its preset, none where it has no preset.
    """
    from turbofit.machine.links import preset_links
    from turbofit.machine.presets import match_preset

    visible, machine, preset = request.visible, request.machine, match_preset(gpu)
    if len(visible) == 1:
        return preset_links([preset] * count) if preset else ()
    links = [machine.link(a.index, b.index) for a, b in combinations(visible, 2)]
    between = min(links, key=link_class)
    if between.nvlinked and preset and not preset.nvlink.default:
        between = preset_links([preset] * 2, nvlink=frozenset())[0]
    pairs = dict(zip(combinations(range(len(visible)), 2), links, strict=True))
    made = []
    for a, b in combinations(range(count), 2):
        same = a // len(visible) == b // len(visible)
        link = pairs[a % len(visible), b % len(visible)] if same else between
        made.append(replace(link, a=a, b=b))
    return tuple(made)


def larger(request: ResolvedRequest) -> Iterator[tuple[str, ResolvedRequest]]:
    """As many cards of another kind in this host, of each kind with more memory, smallest first."""
    from turbofit.machine.presets import load_preset, preset_names
    from turbofit.machine.source import machine_from

    count, held = len(request.visible), max(known(one.total, 0) for one in request.visible)
    totals = {name: load_preset(name).total for name in preset_names()}
    for name in sorted(totals, key=lambda one: (totals[one], one)):
        if totals[name] > held:
            made, host = machine_from(f"{count}x{name}"), request.machine.host
            machine = replace(made, name=MORE_GPUS, host=host)
            change = f"{count} x {machine.gpus[0].name} ({format_bytes(totals[name])})"
            yield change, replace(request, machine=machine, tp=None, replicas=None)


def stopped(request: ResolvedRequest) -> Iterator[tuple[str, ResolvedRequest]]:
    """The process that holds most, gone from all its GPUs; all that is held where none is known."""
    held: dict[int, dict[int, Holder]] = {}
    for gpu in request.visible:
        for holder in gpu.holders:
            if holder.pid != "NA" and known(holder.bytes, 0) > 0:
                held.setdefault(holder.pid, {})[gpu.index] = holder
    if not held:
        yield from _freed(request)
        return
    pid, parts = max(held.items(), key=lambda one: _bytes_of(one[1]))
    gpus = tuple(
        _without(one, parts[one.index]) if one.index in parts else one
        for one in request.machine.gpus
    )
    name = next(iter(parts.values())).name
    where = f"GPU{'s' if len(parts) > 1 else ''} {indices(parts)}"
    change = f"stop {name}[{pid}] on {where} ({format_bytes(_bytes_of(parts))})"
    yield change, replace(request, machine=replace(request.machine, gpus=gpus))


def _bytes_of(parts: Mapping[int, Holder]) -> int:
    """What one process holds on all GPUs."""
    return sum(known(holder.bytes, 0) for holder in parts.values())


def _freed(request: ResolvedRequest) -> Iterator[tuple[str, ResolvedRequest]]:
    used = {gpu.index: known(gpu.used, 0) for gpu in request.visible}
    held = [index for index, size in used.items() if size]
    if not held:
        return
    size = format_bytes(max(used.values()))
    where = f"GPU {held[0]} ({size})" if len(held) == 1 else f"the GPUs (up to {size} of each)"
    gpus = tuple(
        replace(one, used=0, free=known(one.free, 0) + used.get(one.index, 0))
        for one in request.machine.gpus
    )
    change = f"free what others hold of {where}"
    yield change, replace(request, machine=replace(request.machine, gpus=gpus))


def _without(gpu: Gpu, holder: Holder) -> Gpu:
    # Holders are read beside the sizes: one may be said to hold more than all of them do.
    freed = min(known(holder.bytes, 0), known(gpu.used, 0))
    return replace(gpu, used=known(gpu.used, 0) - freed, free=known(gpu.free, 0) + freed)
