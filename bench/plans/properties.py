"""Checks what must hold of every plan and of every refusal.

Whether an engine has code for a card follows here from a table that was written by hand for
TurboMind 0.18, from cuobjdump's listing of its wheel, and not from the planner's census.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan

#: Compute capabilities that TurboMind 0.18 has code for at all.
_BUILT: Final = {(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}
#: Those on which its kernels for packed weights and for experts are empty functions.
_EMPTY: Final = {(10, 0), (12, 0)}
_AMPERE: Final = (8, 0)
#: The least compute capability of Triton's fp8.
_FP8: Final = (8, 9)
#: Bytes that nobody can read. Pixels and tokens have fewer digits.
_BARE: Final = re.compile(r"(?<![\w.,])\d{9,}(?![\w.,])")


def of_plan(plan: Plan) -> Iterator[str]:
    """Yield what must hold of a plan but does not."""
    texts = [plan.verdict, *plan.reasons, *plan.warnings]
    texts += [text for one in plan.remedies for text in (one.change, one.effect)]
    yield from (f"a number without a unit: {text}" for text in texts if _BARE.search(text))
    if not plan.fits:
        if not plan.remedies:
            yield f"it does not fit, and nothing to change is named: {plan.verdict}"
        return
    if plan.engines[0].kv.tokens <= 0:
        yield "it fits without a cache"
    for gpu in plan.ledgers:
        if gpu.headroom < gpu.margin:
            yield f"GPU {gpu.index} has less headroom than its margin"
    yield from _code(plan)


def _code(plan: Plan) -> Iterator[str]:
    """Yield the cards on which the engine has no code for the model."""
    quantization, moe = plan.model.quantization, plan.model.text.moe
    used = {index for group in plan.groups for index in group}
    for gpu in plan.machine.gpus:
        card = gpu.compute_capability
        if gpu.index not in used or card == "NA":
            continue
        fp8 = quantization is not None and quantization.method == "fp8"
        if plan.backend.name == "pytorch" and fp8 and card < _FP8:
            yield f"fp8 on {gpu.name} with Triton"
        if plan.backend.name != "turbomind":
            continue
        dtype = plan.engines[0].settings.dtype
        if card not in _BUILT:
            yield f"TurboMind has no code for {gpu.name}"
        if card in _EMPTY and (quantization is not None or moe is not None):
            yield f"TurboMind's kernels for packed weights and experts are empty on {gpu.name}"
        if card == (9, 0) and moe is not None and quantization is None and dtype == "float16":
            yield f"TurboMind has no kernel for experts in float16 on {gpu.name}"
        if card < _AMPERE and dtype == "bfloat16":
            yield f"bfloat16 on {gpu.name}"


def of_refusal(error: TurbofitError) -> Iterator[str]:
    """Yield what must hold of a refusal but does not."""
    if not error.hint:
        yield f"a refusal without a hint: {error.message}"
    if _BARE.search(error.message) or _BARE.search(error.hint):
        yield f"a number without a unit: {error.message}"
