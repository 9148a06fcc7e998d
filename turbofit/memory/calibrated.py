"""Applies a calibration to an account: two measured corrections become terms of a ledger.

No formula gives the memory of contexts, cuBLAS, NCCL, kernels and holes in driver pools; an account
estimates it at the upper end. A calibration measured a real launch, and adds the difference to the
estimates, positive or negative. The cache grows only by bytes that were estimated too high.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.machine import Calibration, Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.struct import known
from turbofit.core.units import MIB, format_bytes
from turbofit.memory.account import NO_IMAGES, Engine, EngineLaunch, StaticMemory, term

#: The terms of the two corrections.
CONTEXT: Final = "calibration.context"
BUFFERS: Final = "calibration.buffers"
#: Bytes by which other processes may hold more memory than at calibration, as a desktop does.
_JITTER: Final = 32 * MIB
#: The words for each rate of `MeasuredRate`, in the order of a sentence.
_RATES: Final = {
    "bandwidth": "reading weights", "cache_bandwidth": "reading the cache", "flops": "products",
    "vision_flops": "vision",
}  # fmt: skip


def identity(model: Model) -> str:
    """Return the checkpoint's identity in calibrations, equal for folder, preset and hub."""
    name = (model.hub_id or model.name).rpartition("/")[2]
    return f"{name} ({model.architecture}, {model.parameters})"


def calibration_for(launch: EngineLaunch, engine: str, version: str) -> Calibration | None:
    """Return the newest calibration for exactly this launch; None if there is none.

    The settings must agree in the number of GPUs and, for TurboMind, in the communicator;
    ``version`` is the account's generation. A calibration is left out if the GPUs had more free
    bytes at the calibration.
    """
    calibrations = _calibrations_of(launch, engine, version)
    believed = (
        calibration for calibration in calibrations if calibration.free <= _free(launch) + _JITTER
    )
    return max(believed, key=lambda calibration: calibration.when, default=None)


def _calibrations_of(launch: EngineLaunch, engine: str, version: str) -> list[Calibration]:
    """Return the calibrations for exactly this launch, regardless of free memory."""
    if not launch.machine.calibrations:
        return []
    names = tuple(sorted(gpu.name for gpu in launch.gpus))
    driver, communicator = str(launch.machine.driver), launch.settings.communicator
    wanted = (identity(launch.model), engine, version, names, driver, communicator)
    return [
        calibration
        for calibration in launch.machine.calibrations
        if (
            calibration.model,
            calibration.engine,
            calibration.engine_version,
            calibration.gpus,
            calibration.driver,
            calibration.communicator,
        )
        == wanted
    ]


def timed_for(
    model: Model, settings: Settings, machine: Machine, gpus: Sequence[Gpu], engine: Engine
) -> Calibration | None:
    """Return the newest calibration that timed this engine's steps; None if there is none.

    The calibration has the settings' type of keys and values. Free memory does not matter.
    """
    launch = EngineLaunch(
        model=model, settings=settings, gpus=tuple(gpus), machine=machine, vision_load=NO_IMAGES
    )
    timed = (
        calibration
        for calibration in _calibrations_of(launch, engine.name, engine.version)
        if calibration.steps is not None and calibration.steps.quant_policy == settings.quant_policy
    )
    return max(timed, key=lambda calibration: calibration.when, default=None)


def weights_of(model: Model) -> str:
    """Return how a model stores its weights; empty for a model that shows no rate of a card.

    Models with experts or gated delta nets show no rate, since the speed formula fits them less.
    """
    if model.text.moe is not None or model.text.delta is not None:
        return ""
    stored = model.quantization
    return "16 bits" if stored is None else f"{stored.method}, {stored.bits} bits"


def rates_shown(
    model: Model, settings: Settings, machine: Machine, gpus: Sequence[Gpu], engine: Engine
) -> tuple[dict[str, float], str]:
    """Return the rates of these cards that the forwards of other models on this engine show.

    The keys are those of `MeasuredRate`; the text names the other models and the days. The other
    models must store weights, keys and values as this model does. Each rate is from the calibration
    with the smallest spread of that rate.
    """
    names, driver = {gpu.name for gpu in gpus}, str(machine.driver)
    wanted = (weights_of(model), settings.quant_policy, engine.name, engine.version, names, driver)
    shown = [
        (rate, calibration)
        for calibration in machine.calibrations
        if calibration.steps is not None
        for rate in calibration.steps.rates
        if wanted
        == (
            calibration.steps.weights, calibration.steps.quant_policy, calibration.engine,
            calibration.engine_version, {*calibration.gpus}, calibration.driver,
        )
    ]  # fmt: skip
    shown.sort(key=lambda pair: pair[0].spread, reverse=True)
    # The smallest spread is last now, and replaces the earlier rates of the same kind.
    best = {rate.of: (rate, calibration) for rate, calibration in shown}
    what = ", ".join(words for of, words in _RATES.items() if of in best)
    timed = {
        (calibration.when[:10], calibration.model.partition(" ")[0], calibration.where)
        for _, calibration in best.values()
    }
    models = " and ".join(f"{where} on {day} with {name}" for day, name, where in sorted(timed))
    source = f"{what} of the cards as measured {models}, another model"
    return {of: rate.value for of, (rate, _) in best.items()}, source if best else ""


def unbelieved(launch: EngineLaunch, engine: str, version: str) -> str:
    """Say why `calibration_for` rejects all calibrations of a launch; empty if it rejects none."""
    free, calibrations = _free(launch), _calibrations_of(launch, engine, version)
    least = min((calibration.free for calibration in calibrations), default=0)
    if least <= free + _JITTER:
        return ""
    return (
        f"the calibration does not count: {format_bytes(least)} were free on each GPU at the"
        f" calibration, and {format_bytes(free)} are free now (turbofit calibrate MODEL)"
    )


def _free(launch: EngineLaunch) -> int:
    """Return the free bytes of the fullest card, before the engine makes its context."""
    return min(known(gpu.free, 0) for gpu in launch.gpus)


def corrected(memory: StaticMemory, calibration: Calibration | None) -> StaticMemory:
    """Add the corrections to a GPU's memory as separate terms.

    With TurboMind, at most the estimated terms after the cache are subtracted, since smaller
    forwards than those of the calibration leave smaller holes in pools.
    """
    if calibration is None:
        return memory
    before, buffers = memory.before, memory.buffers
    if calibration.context:
        note = _note(calibration, "CUDA context, cuBLAS, torch's kernels and communicator")
        line = term(CONTEXT, "context", calibration.context, "measured", note)
        at = next((i for i, line in enumerate(before) if line.phase == "weights"), len(before))
        before = (*before[:at], line, *before[at:])
    later = calibration.buffers
    if any(line.term == "pool_growth" for line in buffers):
        later = max(later, -sum(line.bytes for line in buffers if line.basis == "estimate"))
    if later:
        note = _note(calibration, "kernels, pools and other memory after the cache")
        buffers = (*buffers, term(BUFFERS, "buffers", later, "measured", note))
    return replace(memory, before=before, buffers=buffers)


def calibration_reason(calibration: Calibration) -> str:
    """Say why a plan counts more or fewer bytes than its estimates."""
    more = calibration.total
    size = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} than"
    amount = f"{size if more else 'as'} estimated"
    return (
        f"contexts, libraries and kernels took {amount} on each GPU, as measured"
        f" {calibration.where} on {calibration.when[:10]} with LMDeploy {calibration.lmdeploy}"
        " (turbofit calibrate MODEL --forget drops this calibration)"
    )


def _note(calibration: Calibration, what: str) -> str:
    where = "PRETEND GPUs" if calibration.pretend else f"driver {calibration.driver}"
    return (
        f"{what}: measured less the estimates, on {calibration.gpus[0]}, {where}, LMDeploy"
        f" {calibration.lmdeploy}, {calibration.when[:10]}"
    )
