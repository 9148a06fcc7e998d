"""The cards against the kernels that TurboMind holds for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.struct import NA
from turbofit.diagnose.doctor.finding import Finding, ok, stops, unreadable, warning
from turbofit.kernels import families
from turbofit.memory.shared_terms import AMPERE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.core.machine import Gpu
    from turbofit.diagnose.doctor.sources import Sources
    from turbofit.kernels.census import Census

__all__ = ["capabilities", "kernel_findings"]

_16_BITS: Final = ("float16", "bfloat16")
#: Weights beside those of 16 bits, as people know them.
_PACKED: Final = {"int4": "int4 (AWQ, GPTQ)", "fp8": "fp8", "mxfp4": "mxfp4"}


def kernel_findings(sources: Sources, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """What a card's generation costs, and what TurboMind has no code for."""
    cards = capabilities(gpus)
    yield _generation(gpus, cards)
    if cards:
        yield _kernels(sources.kernels(), cards)


def capabilities(gpus: Sequence[Gpu]) -> dict[str, tuple[int, int]]:
    """Compute capability by the card's name, where it is known."""
    return {gpu.name: gpu.compute_capability for gpu in gpus if gpu.compute_capability != NA}


def _generation(gpus: Sequence[Gpu], cards: dict[str, tuple[int, int]]) -> Finding:
    check = "compute_capability"
    if not cards or len(cards) < len({gpu.name for gpu in gpus}):
        return unreadable(
            check, "the cards' compute capability", "it decides the dtype and the kernels"
        )
    halves = [name for name, version in cards.items() if version < AMPERE]
    if halves:
        return warning(
            check,
            f"{', '.join(halves)}: no bfloat16",
            "LMDeploy runs bfloat16 checkpoints in float16 there, and casting them takes memory",
            "nothing, the plan counts it; models with large activations may overflow",
        )
    return ok(check, ", ".join(f"{name} {a}.{b}" for name, (a, b) in cards.items()))


def _kernels(census: Census | None, cards: dict[str, tuple[int, int]]) -> Finding:
    check = "kernels"
    if census is None:
        return unreadable(
            check,
            "the kernels of TurboMind",
            "an engine without code for a card or for a model's weights aborts at the first"
            " request",
        )
    without = [name for name, version in cards.items() if not census.runs(version)]
    if without:
        return stops(
            check,
            f"TurboMind has no code for {', '.join(without)}, only for"
            f" {census.architecture_names()}",
            "it fails at its first kernel there",
            "leave these GPUs out with --gpus, or plan with --engine pytorch where Triton compiles"
            " for them",
        )
    lacking = [
        f"{name}: {', '.join(missing)}"
        for name, version in cards.items()
        if (missing := list(_lacking(census, version)))
    ]
    if lacking:
        return warning(
            check,
            f"no TurboMind kernel for {'; '.join(lacking)}",
            "a model with such weights aborts at its first request",
            "nothing: turbofit plans such models on another engine; turbofit doctor --kernels shows"
            " all",
        )
    return ok(check, f"TurboMind has code for {', '.join(cards)}")


def _lacking(census: Census, capability: tuple[int, int]) -> Iterator[str]:
    """Weights that no kernel multiplies on this card, whatever the activations are."""
    architecture = census.architecture(capability)
    if architecture is None:
        return  # PTX, whose families are not read
    for weights, name in _PACKED.items():
        ways = [families.gemm(weights, one) for one in _16_BITS]
        ways += [families.experts(weights, one) for one in _16_BITS]
        if not census.count(ways, architecture).code:
            yield name
    if not census.count([families.experts(one, one) for one in _16_BITS], architecture).code:
        yield "experts in 16 bits"
