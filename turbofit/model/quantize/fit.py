"""Says whether a machine can quantise a model, with how many samples, and which card could."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, ClassVar, Final

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu, Machine, Size
from turbofit.core.messages import counted
from turbofit.core.model import Model
from turbofit.core.struct import NA, JsonDocument, NaType, const, doc, known
from turbofit.core.units import MIB, format_bytes
from turbofit.core.version import __version__
from turbofit.machine.presets import context_bytes, load_preset, preset_names
from turbofit.model.quantize.needs import AwqNeeds, Needs, awq_needs, needs_of
from turbofit.model.quantize.program import INSTALL, Request, program_text
from turbofit.model.quantize.scheme import Scheme, published, scheme_for

SCHEMA: Final = "turbofit.quantize/1"
#: Samples, and tokens of each, that are tried where nobody names a number, the most first.
SAMPLES: Final = (256, 128, 64)
TOKENS: Final = (2048, 1024, 512)


class Quantizing(JsonDocument):
    """What `turbofit quantize MODEL` answers; sizes in bytes."""

    what: ClassVar[str] = "a quantisation"

    schema: Annotated[str, const(SCHEMA)] = SCHEMA
    turbofit_version: str = __version__
    model: Annotated[str, doc("The checkpoint as the program names it: a folder or a hub id.")]
    folder: Annotated[str, doc("The folder that the program makes.")]
    parameters: int
    machine: str
    fits: Annotated[bool, doc("Whether card and host memory are enough, as far as they are known.")]
    verdict: str
    scheme: Scheme
    needs: Needs
    context: Annotated[int, doc("The CUDA context of the program on this card, at most.")]
    card_free: Annotated[int, doc("Free bytes of the freest card.")]
    environment: Annotated[
        dict[str, str], doc("Variables with which the program runs on this card.")
    ]
    host_available: Size | NaType
    smallest_card: Annotated[str | None, doc("The smallest known card that is large enough.")]
    auto_awq: Annotated[AwqNeeds, doc("What LMDeploy's own tool takes, with its usual samples.")]
    install: Annotated[str, doc("The pip command of the packages that the program imports.")]
    program: Annotated[str, doc("The program for llm-compressor.")]
    warnings: tuple[str, ...] = ()


def quantizing(model: Model, machine: Machine, request: Request) -> Quantizing:
    """Count what a quantisation takes, and write the program for it.

    Numbers that the request leaves out are the most samples, then the most tokens, that fit.

    Raises:
        UsageError: the model cannot be packed so that LMDeploy reads it, or its context is shorter
            than the samples.
    """
    longest = model.text.max_position_embeddings
    if request.tokens is not None and request.tokens > longest:
        raise UsageError(
            f"samples of {request.tokens:,} tokens are longer than the model's {longest:,}",
            hint=f"`--calib-seqlen {longest}`",
        )
    scheme = scheme_for(model)
    gpu = max(map(machine.gpu, machine.visible), key=lambda card: known(card.free, 0))
    available = machine.host.ram_available
    context, _ = context_bytes(gpu)
    counted = [needs_of(model, scheme, *pair) for pair in _tried(request, longest)]
    fitting = [one for one in counted if not _shortages(one, context, gpu, available)]
    needs = (fitting or counted[-1:])[0]
    shortages = _shortages(needs, context, gpu, available)
    was_given = request.samples is not None and request.tokens is not None
    return Quantizing(
        model=request.name,
        folder=request.folder,
        parameters=model.parameters,
        machine=machine.name,
        fits=not shortages,
        verdict=_verdict(needs, gpu, available, shortages, was_given=was_given),
        scheme=scheme,
        needs=needs,
        context=context,
        card_free=known(gpu.free, 0),
        environment=_environment(machine, gpu),
        host_available=available,
        smallest_card=_smallest_card(needs.card),
        auto_awq=awq_needs(model),
        install=INSTALL,
        program=program_text(model, scheme, request, needs),
        warnings=(*model.warnings, *filter(None, [published(model)]), *_untried(model)),
    )


def _tried(request: Request, longest: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of samples and tokens: first fewer samples, then shorter ones."""
    usual = [length for length in TOKENS if length <= longest] or [longest]
    lengths = usual if request.tokens is None else [request.tokens]
    counts = SAMPLES if request.samples is None else (request.samples,)
    for length, count in product(lengths, counts):
        yield count, length


def _shortages(needs: Needs, context: int, gpu: Gpu, available: int | NaType) -> list[str]:
    """Return what is too small, and by how much."""
    found = []
    lacks = needs.card + context - known(gpu.free, 0)
    if lacks > 0:
        found.append(f"the card lacks {format_bytes(lacks)}")
    if available != NA and needs.host > available:
        found.append(f"host memory lacks {format_bytes(needs.host - available)}")
    return found


def _environment(machine: Machine, gpu: Gpu) -> dict[str, str]:
    """Return what makes a card the first one of a process; nothing where there is no other card."""
    if len(machine.gpus) == 1:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(gpu.index)}


def _verdict(
    needs: Needs, gpu: Gpu, available: int | NaType, shortages: list[str], *, was_given: bool
) -> str:
    """Say whether the card can make it; ``was_given``: a person gave both numbers."""
    size = f"{counted(needs.samples, 'sample')} of {needs.tokens:,} tokens"
    if shortages:
        with_ = "with" if was_given else "not even with"
        return f"{gpu.name} cannot make it, {with_} {size}: {'; '.join(shortages)}"
    made = f"{gpu.name} can make it, with {size}"
    if available == NA:
        return f"{made}, if the host has {format_bytes(needs.host)} of memory left"
    return made


def _untried(model: Model) -> Iterator[str]:
    """Yield what of the count was not held against a whole run (bench/quantize/RESULTS.md)."""
    if model.text.moe is not None:
        yield (
            "the card's count for experts was tried on one layer of one model (Qwen3-30B-A3B), on"
            " pretend GPUs"
        )


def _smallest_card(card: int) -> str | None:
    """Return the preset of the smallest card with ``card`` bytes beside the context, or None."""
    large = []
    for name in preset_names():
        preset = load_preset(name)
        free = preset.total - preset.reserved - preset.context_mib.high * MIB
        if free >= card:
            large.append((preset.total, name))
    return min(large)[1] if large else None
