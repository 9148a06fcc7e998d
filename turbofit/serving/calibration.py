"""Compares a launch's memory on each GPU with the plan, and corrects later plans.

There are two corrections, in bytes per GPU (`turbofit.memory.calibrated` adds them to ledgers):

- ``context``: the bytes in use before the engine sized its cache, by the engine's log, minus the
  forecast.
- ``buffers``: the most bytes in use after the cache was allocated, minus the forecast and minus
  ``context``. The bytes are measured after the warm-up, after one small request of each kind, and
  under each worst case. The small requests load the kernels for images and sampling.

Corrections are rounded up. A correction never removes more bytes than the estimates that it
corrects, so formulas and worst cases keep their size. A corrected forecast of the measured launch
is at least the measured value. The margin is added to the corrected forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.machine import Calibration, MeasuredSteps
from turbofit.core.plan import BEFORE_CACHE, EnginePlan, GpuLedger, Plan
from turbofit.core.run_report import RunFigure
from turbofit.core.struct import Document, Struct, to_builtins
from turbofit.core.units import MIB, mib, round_up
from turbofit.logs.log_events import CacheBudget, Slab
from turbofit.memory.account import POOL_WARMUP, TEMPORARIES, CacheShape, LoggedSlab
from turbofit.memory.calibrated import BUFFERS, CONTEXT, identity
from turbofit.memory.engines import engine_of

#: Names of the readings after the warm-up, and after one small request of each kind.
STEADY: Final = "steady"
KERNELS: Final = "kernels"
#: The smallest difference of two ratios that the log shows, with three decimals.
_ROUNDED: Final = 0.001
#: The file in a run's folder that holds the readings of `calibrate`.
SEEN_FILE: Final = "seen.json"


class CalibratedGpu(Struct):
    """The measured bytes in use on one GPU, by all processes together.

    ``before``: bytes before the launch; ``used``: the most bytes in each phase of the launch.
    """

    index: int
    before: int
    used: dict[str, int]


class Observation(Struct):
    """The measurements of the engine of one group of GPUs.

    ``free`` is the free memory of the group's fullest GPU, ``region`` the size of the cache. Both
    are bytes from the engine's log, None if the log has no such figure. ``steps`` are the engine's
    timed forwards, None if forwards were not timed.
    """

    group: int
    free: int | None
    region: int | None
    cards: tuple[CalibratedGpu, ...]
    steps: MeasuredSteps | None = None


def learn(
    plan: Plan, observations: Sequence[Observation], *, lmdeploy: str, when: str, pretend: bool
) -> tuple[Calibration, ...]:
    """Return corrections for later plans; equal groups share the largest measured correction.

    ``lmdeploy`` is the version of the engines, ``when`` the present time as ISO 8601.
    """
    calibrations: dict[tuple[str, ...], Calibration] = {}
    for observation in observations:
        ledgers = _ledgers(plan, observation)
        names = tuple(sorted(ledger.name for ledger in ledgers))
        context = _context(observation, ledgers)
        buffers = _buffers(plan, observation, ledgers, context)
        if plan.model.image_rule is not None and plan.promise.limits.vision_unit is None:
            # Without images no kernels of the tower were loaded: no correction may remove bytes.
            context, buffers = max(0, context), max(0, buffers)
        planned = plan.engines[observation.group]
        free = min(
            ledger.usable - card.before
            for card, ledger in zip(observation.cards, ledgers, strict=True)
        )
        calibration = Calibration(
            model=identity(plan.model),
            engine=plan.backend.name,
            engine_version=plan.backend.version,
            lmdeploy=lmdeploy,
            gpus=names,
            driver=str(plan.machine.driver),
            communicator=planned.settings.communicator,
            when=when,
            context=context + ledgers[0].bytes_of(CONTEXT),
            buffers=buffers + ledgers[0].bytes_of(BUFFERS),
            pretend=pretend,
            free=free,
            steps=observation.steps,
        )
        alike = calibrations.get(names, calibration)
        calibrations[names] = replace(
            alike,
            context=max(alike.context, calibration.context),
            buffers=max(alike.buffers, calibration.buffers),
            spread=max(alike.spread, abs(alike.total - calibration.total)),
            free=max(alike.free, calibration.free),
            steps=alike.steps or calibration.steps,
        )
    return tuple(calibrations.values())


def phase_rows(plan: Plan, observations: Sequence[Observation]) -> list[Document]:
    """Return rows that compare forecast and measured bytes of each phase of a launch.

    A row is ``{group, gpu, phase, forecast, measured, over}``, in bytes in use on the card. A
    positive ``over`` is memory that the plan counted and the launch did not take. Each GPU has its
    own rows. Two phases come from the engine's log and have one row for the whole group.
    """
    rows: list[dict[str, Any]] = []
    for observation in observations:
        ledgers = _ledgers(plan, observation)
        if observation.free is not None:
            tightest = _tightest(observation, ledgers)
            rows.append(
                _row(observation, tightest.index, "context and weights",
                     tightest.bytes_in(*BEFORE_CACHE),
                     tightest.usable - observation.free - _drift(observation, tightest))
            )  # fmt: skip
        if observation.region is not None:
            ledger = ledgers[0]
            rows.append(
                _row(
                    observation, ledger.index, "cache", ledger.bytes_of("kv_cache"),
                    _shape(plan, plan.engines[observation.group]).held(observation.region),
                )
            )  # fmt: skip
        for card, ledger in zip(observation.cards, ledgers, strict=True):
            forecast = most = 0
            for name, used in card.used.items():
                # Memory pools keep their largest size, so a row has the most bytes of its phase and
                # all earlier phases, also if a restart has emptied the pools meanwhile.
                forecast = max(forecast, _forecast(ledger, name))
                most = max(most, _ours(card, ledger, used))
                rows.append(_row(observation, card.index, name, forecast, most))
    return rows


def document(plan: Plan, observations: Sequence[Observation]) -> Document:
    """Return the plan's facts and all measurements, which are shown and kept with corrections."""
    return {
        "model": identity(plan.model),
        "limits": to_builtins(plan.promise.limits),
        "engines": [
            {"gpus": engine.gpus, "settings": to_builtins(engine.settings)}
            for engine in plan.engines
        ],
        "seen": to_builtins(tuple(observations)),
        "phases": phase_rows(plan, observations),
    }


def _ledgers(plan: Plan, observation: Observation) -> tuple[GpuLedger, ...]:
    by_index = {ledger.index: ledger for ledger in plan.engines[observation.group].ledgers}
    return tuple(by_index[card.index] for card in observation.cards)


def _row(
    observation: Observation, gpu: int, phase: str, forecast: int, measured: int
) -> dict[str, Any]:
    return {
        "group": observation.group, "gpu": gpu, "phase": phase, "forecast": forecast,
        "measured": measured, "over": forecast - measured,
    }  # fmt: skip


def _context(observation: Observation, ledgers: Sequence[GpuLedger]) -> int:
    """Return the bytes in use before the cache was allocated, minus the forecast.

    Only the GPU that was fullest at the launch is compared: the engine's log shows this GPU.
    """
    if observation.free is None:
        return 0
    tightest = _tightest(observation, ledgers)
    excess = tightest.free_for_cache - (observation.free + _drift(observation, tightest))
    # The log rounds its figures, so the result is rounded up to a whole MiB.
    return max(
        round_up(excess, MIB), -_estimated(tightest, BEFORE_CACHE) - tightest.bytes_of(TEMPORARIES)
    )


def _buffers(
    plan: Plan, observation: Observation, ledgers: Sequence[GpuLedger], context: int
) -> int:
    """Return the bytes in use after the cache was allocated, minus the forecast and ``context``.

    The largest difference of all GPUs and phases counts; the difference may be negative.
    """
    engine = plan.engines[observation.group]
    excesses, lowest, shape = [], [], _shape(plan, engine)
    # At the same ratio, the cache of the next start may be larger by one step of its allocation.
    held, step = None, 0
    if observation.region is not None:
        held, step = shape.held(observation.region), shape.step
    for card, ledger in zip(observation.cards, ledgers, strict=True):
        larger_cache = 0 if held is None else held - ledger.bytes_of("kv_cache")
        for name, used in card.used.items():
            forecast = ledger.steady if name in (STEADY, KERNELS) else ledger.peak
            excesses.append(_ours(card, ledger, used) - (forecast + context + larger_cache))
        lowest.append(-_estimated(ledger, ("cache", "buffers")))
        if observation.free is None:
            # Without `free`, the cache hides its share of an error in the estimates before it.
            share = 1 - engine.settings.cache_max_entry_count
            lowest[-1] -= int(share * _estimated(ledger, BEFORE_CACHE))
    return max(round_up(max(excesses) + step, MIB), *lowest) if excesses else 0


def _ours(card: CalibratedGpu, ledger: GpuLedger, used: int) -> int:
    """Return ``used`` without the bytes by which other processes have grown since the plan."""
    return used - card.before + ledger.used


def _tightest(observation: Observation, ledgers: Sequence[GpuLedger]) -> GpuLedger:
    """Return the ledger of the GPU that was fullest at the launch.

    The engine's log shows the figures of this GPU.
    """
    return min(ledgers, key=lambda ledger: ledger.free_for_cache - _drift(observation, ledger))


def _drift(observation: Observation, ledger: GpuLedger) -> int:
    """Return the bytes that other processes held before the launch, minus the planned bytes."""
    card = next(card for card in observation.cards if card.index == ledger.index)
    return card.before - ledger.used


def _forecast(ledger: GpuLedger, name: str) -> int:
    """Return the forecast bytes in use in a phase: after the warm-up, or under a worst case.

    ``name`` is the phase's name; the name of a worst case is that of its term in the ledger.
    """
    if name in (STEADY, KERNELS):
        return ledger.steady
    pool = ledger.bytes_of(POOL_WARMUP)
    case = next((term for term in ledger.terms if term.term == name), None)
    return ledger.peak if case is None else ledger.steady - pool + max(pool, case.bytes)


def _shape(plan: Plan, engine: EnginePlan) -> CacheShape:
    """Return the layout of an engine's cache in the plan."""
    return engine_of(plan).cache(plan.model, engine.settings)


def _estimated(ledger: GpuLedger, phases: Sequence[str]) -> int:
    """Return the bytes of a ledger's estimated terms in ``phases``, which are phases of terms.

    These bytes are the most that a correction may remove.
    """
    return sum(
        term.bytes
        for term in ledger.terms
        if term.phase in phases and (term.basis == "estimate" or term.term in (CONTEXT, BUFFERS))
    )


def in_words(figure: RunFigure) -> str:
    """Return a figure as text for people, with the relative error of the forecast.

    Of bytes in use beyond the forecast, the text says how many: a forecast must never be less.
    """
    forecast, actual = figure.forecast, figure.actual
    # Adding 0.0 turns -0.0 into 0.0, so that no minus stands before a difference of nothing.
    error = f", {round(actual / forecast - 1, 3) + 0.0:+.1%}" if forecast else ""
    what = figure.what if figure.gpu is None else f"GPU {figure.gpu}: {figure.what}"
    if is_beyond(figure):
        error = f": {mib(actual - forecast)} MiB more, which the margin must hold"
    if figure.unit == "tokens":
        return f"{what}: {actual:,} (forecast {forecast:,}{error})"
    return f"{what}: {mib(actual)} MiB (forecast {mib(forecast)}{error})"


def is_beyond(figure: RunFigure) -> bool:
    """Return whether more bytes of a GPU are in use than the plan forecast."""
    return figure.gpu is not None and figure.actual > figure.forecast


def compare_cache(engine: EnginePlan, budget: CacheBudget) -> tuple[RunFigure, ...]:
    """Compare two forecasts with the engine's log, in bytes per GPU.

    The first is the memory that was free when the engine sized its cache, the second is the cache.
    """
    free = min(ledger.free_for_cache for ledger in engine.ledgers)
    # A start on shared GPUs has another ratio, with which the cache keeps its planned size.
    if abs(engine.settings.cache_max_entry_count - budget.ratio) >= _ROUNDED and budget.ratio:
        free = round(engine.kv.region_bytes / budget.ratio)
    return (
        RunFigure(what="free when the cache was sized", forecast=free, actual=budget.free),
        RunFigure(what="KV cache", forecast=engine.kv.region_bytes, actual=budget.budget),
    )


def compare_tokens(plan: Plan, engine: EnginePlan, budget: CacheBudget, slab: Slab) -> RunFigure:
    """Compare the forecast number of KV tokens with the number that the engine's log shows.

    The block sizes in the log give the number of tokens. For a hybrid model, the planned block
    sizes are used, since the sizes in the log include the states of sequences.
    """
    logged, shape = LoggedSlab(slab.slab_size, slab.object_size), None
    if plan.model.text.delta is None:
        shape = engine_of(plan).logged_cache([logged], engine.settings)
    tokens = (shape or _shape(plan, engine)).tokens(budget.budget)
    return RunFigure(what="KV tokens", forecast=engine.kv.tokens, actual=tokens, unit="tokens")
