"""How LMDeploy changes the dtype without a message, on either engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu
from turbofit.core.model import Model
from turbofit.memory.shared_terms import AMPERE, HOPPER, capability_of

__all__ = ["chosen_dtype", "dtype_for"]


def dtype_for(model: Model, gpus: Sequence[Gpu]) -> tuple[Literal["float16", "bfloat16"], str]:
    """The dtype that ``auto`` becomes on these GPUs, and why.

    AWQ, GPTQ and packed int4 run in float16; cards before Ampere have no bfloat16. On Hopper int4
    runs in bfloat16 too, and gated delta nets in nothing else.
    """
    packed = model.quantization
    if packed is not None and packed.bits == 4 and not packed.of_experts:
        if model.text.delta is not None and all(_capability(gpu) == HOPPER for gpu in gpus):
            return "bfloat16", "gated delta nets run in bfloat16 on Hopper"
        return "float16", f"{packed.method} runs in float16"
    if any(_capability(gpu) < AMPERE for gpu in gpus):
        return "float16", "these GPUs have no bfloat16"
    if model.dtype == "float16":
        return "float16", "the checkpoint's own"
    return "bfloat16", "the checkpoint's own" if model.dtype == "bfloat16" else "of float32"


def chosen_dtype(model: Model, fixed: object, gpus: Sequence[Gpu]) -> str:
    """The user's dtype, or what ``auto`` becomes on these GPUs.

    Raises:
        UsageError: they cannot run the user's, and LMDeploy would change it without a word.
    """
    possible, why = dtype_for(model, gpus)
    if not isinstance(fixed, str) or fixed == "auto":
        return possible
    if fixed == "bfloat16" and possible == "float16" and why != "the checkpoint's own":
        raise UsageError(
            f"--dtype bfloat16 cannot run: {why}",
            hint="leave --dtype out: float16 is chosen where it is needed",
        )
    return fixed


def _capability(gpu: Gpu) -> tuple[int, int]:
    """Compute capability; where it cannot be read, one that has bfloat16."""
    return capability_of(gpu, unknown=AMPERE)
