"""What people are told of a fallback plan: the verdict, and what is slow about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from turbofit.core.machine import Gpu
from turbofit.core.messages import BEYOND, groups_of, on_each_gpu
from turbofit.core.plan import GpuLedger
from turbofit.core.units import format_bytes
from turbofit.tuner.fallback.search import Chosen
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import too_long
from turbofit.tuner.search.context import excess_tokens

__all__ = ["at_once", "verdict", "warnings"]

#: Bytes/s of one PCIe lane in one direction, by generation, before protocol overhead.
_LANE: Final = {1: 250e6, 2: 500e6, 3: 985e6, 4: 1969e6, 5: 3938e6, 6: 7563e6}


def verdict(
    request: ResolvedRequest,
    chosen: Chosen,
    ledgers: Sequence[GpuLedger],
    host: str | None,
    causes: Sequence[str],
) -> str:
    """Whether it fits, on which GPUs, and what is left; or which GPU is short by how much.

    Args:
        request: what was asked for.
        chosen: what was found.
        ledgers: of each GPU.
        host: what host memory is short of.
        causes: the person's options without each of which it fits.
    """
    name = request.model.name
    unfit = f"does not fit: {name} on Transformers"
    unfit += f" with {' and '.join(causes)}" if causes else ""
    if not chosen.fits and excess_tokens(request, chosen.vision_load):
        return f"{unfit}: {too_long(request, chosen.vision_load)}"
    if not chosen.fits:
        tightest = min(ledgers, key=lambda one: one.headroom - one.margin)
        term = max(tightest.ledger, key=lambda one: one.bytes)
        short = tightest.margin - tightest.headroom
        split = ""
        if (request.replicas or 1) > 1 and request.tp is None:
            split = "; copies are split over GPUs only where --tp asks for it too"
        return (
            f"{unfit}: GPU {tightest.index} is {format_bytes(short)} short even with all decoder"
            f" layers elsewhere, most of it {term.term} ({format_bytes(term.bytes)}){split}"
        )
    if not chosen.keeps(request):
        return (
            f"{unfit}: it answers {len(chosen.copies):,} of {request.promised_requests:,} requests"
            " at once, one a copy"
        )
    if host is not None:
        return f"does not fit: {name}: {host}"
    spare = min(one.headroom for one in ledgers)
    off = len(chosen.placement.offloaded)
    how = f", {off} decoder layers in host memory or on disk" if off else ""
    each = on_each_gpu(sum(map(len, chosen.groups)))
    return (
        f"fits: {name} on GPU {groups_of(chosen.groups)} with Transformers{how}:"
        f" {at_once(chosen)} {chosen.session_len:,} tokens at a time;"
        f" {format_bytes(spare)} stay free{each}"
    )


def at_once(chosen: Chosen) -> str:
    """How many requests run, up to ``of``."""
    copies = len(chosen.copies)
    return "one request of" if copies == 1 else f"{copies} requests, one a copy, of"


def warnings(
    request: ResolvedRequest, chosen: Chosen, placed: Mapping[str, int | str]
) -> Iterator[str]:
    """What a person should know before choosing this engine."""
    yield (
        "the fallback engine is serial and slower than LMDeploy: each copy answers one request at "
        "a time, without batching, paged cache or CUDA graphs"
    )
    if chosen.placement.devices > 1:
        yield (
            f"splitting over {chosen.placement.devices} GPUs adds memory, not speed: their layers "
            "work one after the other"
        )
    yield from _slow(chosen, placed)
    used = {index for group in chosen.groups for index in group}
    idle = [gpu for gpu in request.visible if gpu.index not in used]
    if idle and chosen.fits and not request.least:
        names = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in idle)
        yield f"not used: {names}; --replicas serves on them beside it, --tp splits over them"
    if chosen.vision_load.units_per_image and chosen.fits:
        yield (f"{BEYOND}: turbofit serve holds them, Transformers itself would not")


def _slow(chosen: Chosen, placed: Mapping[str, int | str]) -> Iterator[str]:
    """What layers off the GPUs cost at every token."""
    off = chosen.placement.offloaded
    if not off or not chosen.fits:
        return
    copy = chosen.copies[0]
    size = sum(copy.parts.layers[number].weights for number in off)
    disk = sum(1 for where in placed.values() if where == "disk")
    said = (
        f"{len(off)} of {len(copy.parts.layers)} decoder layers ({format_bytes(size)}) do not "
        "fit on the GPUs and pass through GPU "
        f"{copy.gpus[0].index} at every token"
    )
    rate = _bus(copy.gpus[0])
    if rate is not None:
        said += f": {size / rate:.2g} s a token at the best that its PCIe link can do"
    if disk:
        said += f"; {disk} of them are read from disk each time, which is slower still"
    yield said


def _bus(gpu: Gpu) -> float | None:
    """Bytes/s of a card's PCIe link at best."""
    generation, width = gpu.pcie.generation, gpu.pcie.width
    if not isinstance(generation, int) or not isinstance(width, int):
        return None
    return _LANE[generation] * width if generation in _LANE else None
