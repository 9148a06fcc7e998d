"""All engines that can be rehearsed: how to drive and read each engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from turbofit.core.plan import EnginePlan, Plan
from turbofit.memory.calibrated import BUFFERS, CONTEXT
from turbofit.rehearsal import packages
from turbofit.rehearsal.cases import torch_cases, turbomind_cases
from turbofit.rehearsal.run import EndedRun, Readings
from turbofit.rehearsal.spec import RehearsalCase
from turbofit.rehearsal.torch import readings as torch_readings
from turbofit.rehearsal.turbomind import readings as turbomind_readings


@dataclass(frozen=True)
class RehearsedEngine:
    """How one engine is rehearsed.

    Attributes:
        driver: the name of a module with a function ``drive(spec, notes)``. The function starts the
          engine in the child and drives the cases. It returns None, or a function that closes the
          engine.
        read: reads the memory and the end of an ended run.
        worst: returns the worst cases of one engine of a plan.
        not_known: kinds of memory that the rehearsal cannot see.
        before, after: terms of the ledger that only a real card has. The pretend card is charged
          with ``before`` from the start, and with ``after`` once the engine has read free memory.
        process_context: whether the pretend machine charges each process for its CUDA context.
        environ: environment variables of the engine's processes.
        path: folders in which the engine's processes look for modules first.
        library: finds the engine's library, if the record names its calls.
    """

    driver: str
    read: Callable[[EndedRun], Readings]
    worst: Callable[[Plan, EnginePlan], tuple[RehearsalCase, ...]]
    not_known: Sequence[str]
    before: tuple[str, ...]
    after: tuple[str, ...]
    process_context: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)
    path: tuple[Path, ...] = ()
    library: Callable[[], Path] | None = None


def _on_torch(driver: str) -> RehearsedEngine:
    """Return how an engine on torch is rehearsed; ``driver`` is a module of `rehearsal.torch`."""
    return RehearsedEngine(
        driver=f"turbofit.rehearsal.torch.{driver}",
        read=torch_readings.read_run,
        worst=torch_cases,
        not_known=torch_readings.NOT_KNOWN,
        before=(),
        after=("kernel_modules", BUFFERS),
        process_context=True,
        environ={
            "LMDEPLOY_ENABLE_CHECK_ENV": "0",  # this check needs values that a card computes
            "RAY_ADDRESS": "local",  # workers of a cluster that runs on this host have real GPUs
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
        },
        path=(packages.INSIDE,),
    )


REHEARSED_ENGINES: Final[Mapping[str, RehearsedEngine]] = {
    "turbomind": RehearsedEngine(
        driver="turbofit.rehearsal.turbomind.drive",
        read=turbomind_readings.read_run,
        worst=turbomind_cases,
        not_known=turbomind_readings.NOT_KNOWN,
        before=("cuda_context", "cublas", "torch_kernels", CONTEXT),
        after=("kernel_modules", "pool_growth", BUFFERS),
        environ={"TM_LOG_LEVEL": "INFO", "OMP_NUM_THREADS": "1"},
        library=packages.engine_library,
    ),
    "pytorch": _on_torch("torch_engine"),
    "transformers": _on_torch("torch_generate"),
}
