"""Finds the memory constants that the stored runs imply, each beside the preset's.

Of several readings of a constant the largest counts, with which plans use less memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.gpu.results import Trial
from bench.gpu.terms import after_cache, before_cache
from turbofit.core.presets import load_yaml, presets_dir
from turbofit.core.struct import NA
from turbofit.core.units import MIB
from turbofit.memory.account import HOPPER, POOL_WARMUP
from turbofit.memory.turbomind.weights import load_constants

_TURBOMIND = "engines/turbomind-0.18.yaml"


@dataclass(frozen=True)
class Reading:
    """The value of one constant by one trial, in the preset's own unit.

    ``noise`` is the difference from the preset that means nothing.
    """

    preset: str
    key: str
    value: float
    trial: str
    noise: float = 0.0


@dataclass(frozen=True)
class Implied:
    """A constant's value in the preset (``now``) and by the trials."""

    preset: str
    key: str
    now: float | None
    value: float
    lowest: float
    trials: tuple[str, ...]
    changes: bool

    @property
    def meaning(self) -> str:
        """The fault of the preset's value, in words."""
        if not self.changes:
            return "holds"
        if self.now is None:
            return "missing"
        more = self.value > self.now
        return "under: memory is not paid for" if more else "over: cache is wasted"


def readings(trial: Trial) -> Iterator[Reading]:
    """Yield a trial's readings of its card's preset, and of holes in TurboMind's pools."""
    turbomind = trial.plan.backend.name == "turbomind"
    if trial.preset is not None:
        file, gpu = f"gpus/{trial.preset}.yaml", trial.gpu
        for key, size in (("total_mib", gpu.total), ("reserved_mib", gpu.reserved)):
            if isinstance(size, int):
                yield Reading(file, f"{key}.value", size / MIB, trial.name, noise=2.0)
        if isinstance(gpu.sm_count, int):
            yield Reading(file, "sm_count.value", gpu.sm_count, trial.name)
        before = before_cache(trial) if turbomind else None
        if before is not None:
            context = -(-(before - _beside_context(trial)) // MIB)
            yield Reading(file, "context_mib.high", context, trial.name, noise=2.0)
    after = after_cache(trial) if turbomind else None
    if after is not None and trial.document.run.state != "failed":
        yield _holes(trial, after - load_constants().kernel_modules)


def _beside_context(trial: Trial) -> int:
    """Return the charged bytes of cuBLAS handles and of torch's kernels."""
    constants, card = load_constants(), trial.gpu.compute_capability
    kind = "hopper" if card != NA and card >= HOPPER else "default"
    return constants.cublas_handles * constants.cublas_handle[kind] + constants.torch_kernels


def _holes(trial: Trial, rest: int) -> Reading:
    """Return the reading of holes in pools: ``most`` if the plan charges it, else ``share``."""
    constants, ledger = load_constants(), trial.plan.ledgers[0].terms
    rule, step = constants.pool_growth, constants.pool_granularity
    largest = max(t.bytes for t in ledger if t.phase == "transient" or t.term == POOL_WARMUP)
    if trial.plan.model.mrope and all(term.term != "mrope_pool" for term in ledger):
        rest -= step  # of the engine thread's own pool, which plans before 0.1 had in this term
    key, unit = "pool_growth.value", 1 if rule["share"] * largest >= rule["most"] else largest
    key = f"{key}.{'most' if unit == 1 else 'share'}"
    return Reading(_TURBOMIND, key, rest / unit, trial.name, noise=step / unit)


def value_of(preset: str, key: str) -> Any:
    """Return a value of a preset by its path of keys; None if it is missing."""
    found: Any = load_yaml(presets_dir() / preset)
    for part in key.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def implied(found: Iterable[Reading]) -> list[Implied]:
    """Combine the readings of each constant, beside its value in the preset."""
    by_key: dict[tuple[str, str], list[Reading]] = {}
    for one in found:
        by_key.setdefault((one.preset, one.key), []).append(one)
    return [_together(*key, many) for key, many in sorted(by_key.items())]


def _together(preset: str, key: str, many: list[Reading]) -> Implied:
    values, now = [one.value for one in many], value_of(preset, key)
    changes = now is None or abs(max(values) - now) > many[0].noise
    trials = tuple(dict.fromkeys(one.trial for one in many))
    return Implied(preset, key, now, max(values), min(values), trials, changes)
