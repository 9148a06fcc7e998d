"""Whether TurboMind holds the kernels that a launch needs, for each card of the launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from turbofit.core.machine import Gpu
from turbofit.kernels import families
from turbofit.kernels.census import Census
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.turbomind.constants import EngineConstants

__all__ = ["missing_delta_kernels", "missing_kernels"]

_INT4: Final = frozenset({"awq", "gptq", "compressed-tensors"})
_KV: Final = {4: "int4", 8: "int8"}
#: What a card of unknown compute capability is taken for: code must be there for all of them.
_ASSUMED: Final = ((8, 0), (8, 6), (8, 9), (9, 0))


def missing_kernels(launch: EngineLaunch, census: Census) -> str | None:
    """What the engine has no code for on one of these cards, in words; None where it has all.

    Of attention sinks it has none where it computes in another type than the checkpoint's, which
    they keep: the first request ends it ("f16 vs. bf16", seen on pretend GPUs).
    A family counts as there when one of its kernels has code. Under: the engine may choose another
    kernel of the family, which a rehearsal finds.
    """
    model, dtype = launch.model, launch.settings.dtype
    if model.text.sinks and dtype != model.dtype:
        return f"no attention in {dtype} with sinks, which stay in the checkpoint's {model.dtype}"
    every = (
        problem
        for gpu in launch.gpus
        for capability in _capabilities(gpu)
        for problem in _missing(launch, census, gpu, capability)
    )
    return next(every, None)


def missing_delta_kernels(launch: EngineLaunch, constants: EngineConstants) -> str | None:
    """The same for gated delta nets, which have their own table; without one the engine ends.

    Source: kernels/linear_attn/delta_rule.cu.
    """
    dtype = launch.settings.dtype
    if launch.model.text.delta is None:
        return None
    for gpu in launch.gpus:
        for capability in _capabilities(gpu):
            kernel = constants.delta_kernel(capability)
            if kernel is None:
                return f"no kernel of gated delta nets for {gpu.name}"
            if dtype not in kernel.dtypes:
                return f"no kernel of gated delta nets with {dtype} for {gpu.name}"
    return None


def _capabilities(gpu: Gpu) -> tuple[tuple[int, int], ...]:
    """The card's compute capability; of a card of which it is unknown all that are assumed."""
    return _ASSUMED if gpu.compute_capability == "NA" else (gpu.compute_capability,)


def _missing(
    launch: EngineLaunch, census: Census, gpu: Gpu, capability: tuple[int, int]
) -> Iterator[str]:
    if census.has_ptx(capability):
        return
    architecture = census.architecture(capability)
    card = f"{gpu.name} (compute capability {capability[0]}.{capability[1]})"
    if architecture is None:
        yield f"no code at all for {card}: its kernels are for {census.architecture_names()}"
        return
    for what, names in _needed(launch):
        count = census.count(names, architecture)
        if not count.code:
            empty = f": all {count.empty} are empty functions" if count.empty else ""
            yield f"no {what} for {card}{empty}"


def _needed(launch: EngineLaunch) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Kernels in words, and the families of which one must have code.

    Matrices of 16 bits are cuBLAS's, but for experts. A kernel for rows of experts takes one matrix
    too (LMDeploy, gemm/kernel.cu: what `accept` says of striding modes).
    """
    model, dtype = launch.model, launch.settings.dtype
    weights = _packed(launch)
    if weights is not None:
        both = families.gemm(weights, dtype), families.experts(weights, dtype)
        yield f"GEMM kernel for {weights} weights with {dtype}", both
    if model.text.moe is not None:
        kind = weights or dtype
        yield f"GEMM kernel for experts in {kind}", (families.experts(kind, dtype),)
    head_dim = model.text.head_dim
    yield f"attention kernel for {dtype}, head_dim {head_dim}", (families.prefill(dtype, head_dim),)
    kv = _KV.get(launch.settings.quant_policy, dtype)
    yield (
        f"attention kernel for {dtype} with {kv} KV, head_dim {head_dim}",
        (families.decode(dtype, kv, head_dim),),
    )


def _packed(launch: EngineLaunch) -> str | None:
    """The type of packed weights as the kernels name it; None for 16 bits."""
    quantization = launch.model.quantization
    if quantization is None:
        return None
    return "int4" if quantization.method in _INT4 else quantization.method
