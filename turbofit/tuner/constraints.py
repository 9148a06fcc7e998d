"""What LMDeploy asserts, aborts on or silently changes, checked before anything is launched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.memory.exposure import Exposure
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.pool import symmetric_buffer
from turbofit.memory.turbomind.weights import kv_heads_held

__all__ = ["communicator_problem", "dtype_for", "dtype_problem", "settings_problem", "tp_problem"]

_AMPERE = (8, 0)
_IPC_RANKS = 8


def tp_problem(model: Model, tp: int) -> str | None:
    """Why LMDeploy's loaders would refuse this tensor-parallel degree; None where they do not.

    Source: LMDeploy builders/*.py, models/internvl.py, unified_attention_layer.cc.
    """
    return next(_tp_problems(model, tp), None)


def _tp_problems(model: Model, tp: int) -> Iterator[str]:
    text, vision = model.text, model.vision
    if text.heads % tp:
        yield f"{text.heads} attention heads do not divide by {tp}"
    if text.hidden % tp:
        yield f"hidden size {text.hidden} does not divide by {tp}"
    held = kv_heads_held(text.kv_heads, tp)
    if held % text.kv_heads or text.heads % held:
        yield f"{text.kv_heads} KV heads cannot be repeated over {tp} ranks"
    group = model.quantization.group_size if model.quantization else 1
    if text.heads * text.head_dim // group % tp:
        yield f"the output projection's groups of {group} do not divide by {tp}"
    if vision is None:
        return
    if vision.kind == "internvit" and vision.intermediate % tp:
        yield f"the vision tower's intermediate size {vision.intermediate} does not divide by {tp}"
    if vision.kind != "internvit" and vision.hidden * vision.merge**2 % tp:
        yield f"the vision merger's width does not divide by {tp}"


def dtype_for(model: Model, gpus: Sequence[Gpu]) -> tuple[Literal["float16", "bfloat16"], str]:
    """The dtype that ``auto`` becomes on these GPUs, and why.

    AWQ, GPTQ and packed int4 run in float16; cards before Ampere have no bfloat16.
    """
    if model.quantization is not None and model.quantization.bits == 4:
        return "float16", f"{model.quantization.method} runs in float16"
    if any(_capability(gpu) < _AMPERE for gpu in gpus):
        return "float16", "these GPUs have no bfloat16"
    if model.dtype == "float16":
        return "float16", "the checkpoint's own"
    return "bfloat16", "the checkpoint's own" if model.dtype == "bfloat16" else "of float32"


def dtype_problem(model: Model, dtype: object, gpus: Sequence[Gpu]) -> str | None:
    """Why a dtype that the user set cannot run: LMDeploy would change it without a word."""
    possible, why = dtype_for(model, gpus)
    if dtype == "bfloat16" and possible == "float16" and why != "the checkpoint's own":
        return f"--dtype bfloat16 cannot run: {why}"
    return None


def communicator_problem(
    model: Model, settings: Settings, exposure: Exposure, machine: Machine, gpus: Sequence[Gpu]
) -> str | None:
    """Why ``cuda-ipc`` (or ``native``) would abort: no peers, many ranks, a small buffer."""
    if settings.communicator == "nccl" or settings.tp == 1:
        return None
    name = settings.communicator
    if settings.tp > _IPC_RANKS:
        return f"--communicator {name} takes at most {_IPC_RANKS} GPUs"
    for k, a in enumerate(gpus):
        for b in gpus[:k]:
            if not machine.link(a.index, b.index).peers:
                pair = f"GPUs {b.index} and {a.index}"
                return f"--communicator {name} needs peer access, which {pair} lack"
    vision = model.vision
    if vision is not None and vision.kind != "internvit":
        needed = exposure.units_per_image * vision.hidden * 2
        held = symmetric_buffer(model.text, settings)
        if needed > held:
            return f"--communicator {name}: an image needs {needed} bytes of a buffer of {held}"
    return None


def settings_problem(settings: Settings, constants: EngineConstants) -> str | None:
    """Values that TurboMind refuses or aborts on."""
    if not 0 < settings.cache_max_entry_count < 1:
        return "--cache-max-entry-count must lie between 0 and 1: TurboMind takes no block count"
    if settings.quant_policy not in (0, 4, 8):
        return f"--quant-policy {settings.quant_policy} does not run on TurboMind: 0, 4 or 8 do"
    if settings.session_len < constants.warmup_lengths[0]:
        return f"--session-len {settings.session_len} is shorter than the shortest warm-up"
    return None


def _capability(gpu: Gpu) -> tuple[int, int]:
    """Compute capability; where it cannot be read, one that has bfloat16."""
    return _AMPERE if gpu.compute_capability == "NA" else gpu.compute_capability
