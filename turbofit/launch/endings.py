"""Why an engine ended, as one typed error: from its exit code, its phase and its last words."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from turbofit.core.errors import (
    DoesNotFitError,
    LaunchError,
    OutOfMemoryError,
    TurbofitError,
)
from turbofit.core.units import format_bytes
from turbofit.observe.turbomind_log import CheckFailed, CudaError, NcclError, TorchOutOfMemory

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.plan import Plan
    from turbofit.launch.phases import Watch

__all__ = ["ending", "fallback", "hang"]


def ending(code: int, watch: Watch, plan: Plan, log: Path) -> TurbofitError:
    """The error for an engine that ended by itself.

    Args:
        code: its exit code; negative for a signal, or 128 + the signal.
        watch: what its log said.
        plan: what it was started with.
        log: where its log is.
    """
    number = -code if code < 0 else code - 128 if code > 128 else 0
    where = _where(watch)
    fault = watch.fault
    if isinstance(fault, TorchOutOfMemory):
        asked = f", asking {format_bytes(fault.asked)}" if fault.asked else ""
        return OutOfMemoryError(
            f"the engine ran out of GPU memory {where}{asked}: torch stages the weights on the "
            "first GPU",
            hint=_advice(watch, plan, log),
        )
    if isinstance(fault, CudaError) and fault.out_of_memory:
        return OutOfMemoryError(
            f"the engine ran out of GPU memory {where}: CUDA error: {fault.message}",
            hint=_advice(watch, plan, log),
        )
    if number == signal.SIGKILL:
        return OutOfMemoryError(
            f"the engine was killed {where}: the kernel does so when host memory runs out",
            hint=f"free host memory; the plan counts {format_bytes(plan.host.pageable)} pageable "
            f"and {format_bytes(plan.host.pinned)} pinned; the log is {log}",
        )
    return LaunchError(
        f"the engine ended {where} with {_code(code, number)}{_last_words(watch)}",
        hint=f"its log is {log}",
    )


def hang(watch: Watch, plan: Plan, log: Path) -> TurbofitError:
    """The error for a warm-up that waits for ever: the cache cannot hold one of its requests."""
    tokens = watch.cached_tokens()
    holds = f"{tokens:,} tokens" if tokens is not None else "too few tokens"
    asked = watch.warming or plan.settings.max_prefill_token_num + plan.settings.max_batch_size
    return DoesNotFitError(
        f"LMDeploy hangs in its warm-up: its cache holds {holds}, a request of {asked:,} waits for "
        "room in it, and it would wait for ever without an error",
        hint="free GPU memory, raise --cache-max-entry-count or lower --max-prefill-token-num; "
        f"the log is {log}",
    )


def fallback(watch: Watch, log: Path) -> TurbofitError:
    """The error for LMDeploy choosing another engine than the one planned for."""
    said = watch.fallback.message if watch.fallback is not None else "it fell back to PyTorch"
    return LaunchError(
        f"LMDeploy would run its PyTorch engine, which the plan is not for: {said}",
        hint=f"TurboMind needs NVIDIA's driver and LMDeploy's own CUDA libraries; the log is {log}",
    )


def _where(watch: Watch) -> str:
    phase = {
        "starting": "while it started",
        "weights": "while it loaded weights",
        "cache": "when it allocated the cache",
        "warm-up": "in its warm-up",
        "serving": "while it served",
        "check": "at a worst-case request",
        "ready": "while it served",
    }[watch.phase]
    names = [name for name in watch.frames if not name.startswith("TM_")]
    return f"{phase} (in {names[0]})" if names else phase


def _advice(watch: Watch, plan: Plan, log: Path) -> str:
    """What to change for an out-of-memory of this phase."""
    if watch.phase in ("starting", "weights"):
        return f"more --tp, an AWQ variant or freer GPUs; the log is {log}"
    margin = max(gpu.margin for gpu in plan.gpus)
    return (
        "somebody else may have taken memory, or the plan counted too little: plan with a --margin "
        f"above {format_bytes(margin)}; the log is {log}"
    )


def _code(code: int, number: int) -> str:
    if number:
        try:
            return f"signal {signal.Signals(number).name}"
        except ValueError:
            return f"signal {number}"
    return f"exit code {code}"


def _last_words(watch: Watch) -> str:
    fault = watch.fault
    if isinstance(fault, CudaError):
        return f": CUDA {'driver ' if fault.driver else ''}error: {fault.message}"
    if isinstance(fault, CheckFailed):
        return f": check failed: {fault.message}"
    if isinstance(fault, NcclError):
        return f": {fault.message}"
    if watch.error is not None:
        return f": {watch.error.name}: {watch.error.message}"
    return ""
