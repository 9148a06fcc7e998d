"""Finds what shows that a document of `report --share` is not of a real card.

A run on pretend GPUs breaks these rules, even if its mark was removed; other rules follow from how
things are measured. A careful forgery passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations

from turbofit.core.errors import UsageError
from turbofit.core.machine import Pcie
from turbofit.core.plan import GpuLedger
from turbofit.core.units import MIB
from turbofit.planning.card_rates import refuse_impossible
from turbofit.planning.steps import refuse_contradictions
from turbofit.report.share import SharedRun
from turbofit.report.stored_documents import check_consistent

_DRIVER = re.compile(r"\d{3}\.\d{2,3}(\.\d{2})?")
#: What the driver counts memory in.
_PAGE = 4096
#: Contexts, handles and kernels are estimates of the plan: no real start meets them to the byte.
_SAME = 4096
#: Bytes by which pretend GPUs' figures are off whole MiB, by rounding of the log's.
_ROUNDED = 16
_CONTEXT = "context and weights"
#: Bytes a second of one lane by PCIe's generation; after its encoding.
_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.97e9, 5: 3.94e9, 6: 7.56e9}
#: Shares by which a rate may be above what the link or the memory gives: clocks, rounding.
_ROOM = 1.1


def impossible(one: SharedRun) -> list[str]:
    """Return the reasons why a document is of no real card; none if it may be of one."""
    try:
        check_consistent(one.plan, "plan")
    except UsageError as exc:
        return [exc.message]
    return [*_marks(one), *_readings(one), *_forecasts(one), *_speeds(one), *_timed(one)]


def _timed(one: SharedRun) -> Iterator[str]:
    """Yield timed steps of another engine, and steps that contradict each other or the card."""
    groups = range(len(one.plan.engines))
    for seen in one.seen:
        if seen.group not in groups:
            yield f"engine {seen.group} was timed, and is not in the plan"
        elif seen.steps is not None:
            if seen.steps.quant_policy != one.plan.engines[seen.group].settings.quant_policy:
                yield "its steps were timed with keys and values of another type"
            try:
                refuse_contradictions(seen.steps)
                refuse_impossible(seen.steps.rates, one.plan.machine.gpus)
            except UsageError as exc:
                yield exc.message


def _marks(one: SharedRun) -> Iterator[str]:
    machine = one.plan.machine
    if one.run.pretend:
        yield "it says itself that its GPUs were pretend ones"
    if machine.source != "nvml":
        yield f"its machine was not measured: {machine.source}"
    if not _DRIVER.fullmatch(str(machine.driver)):
        yield f"{machine.driver} is no version of a driver"
    if not re.fullmatch(r"\d+\.\d+\.\d+.*", one.run.lmdeploy):
        yield f"{one.run.lmdeploy!r} is no version of LMDeploy"


def _readings(one: SharedRun) -> Iterator[str]:
    """Yield impossible values among the bytes in use that NVML reads."""
    sizes = {gpu.index: gpu.total - gpu.reserved for gpu in one.plan.ledgers}
    attempts = one.run.attempts
    used = [
        (int(index), size)
        for attempt in attempts
        for moment in attempt.moments
        for index, size in moment.used.items()
    ]
    cards = [card for seen in one.seen for card in seen.cards]
    used += [(card.index, size) for card in cards for size in (card.before, *card.used.values())]
    if not any(moment.used for attempt in attempts for moment in attempt.moments):
        yield "no GPU was read at any moment of its starts"
    for index, size in used:
        if index not in sizes:
            yield f"GPU {index} was read, and is in no ledger"
        elif not 0 <= size <= sizes[index]:
            yield f"GPU {index} had {size} bytes in use of {sizes[index]}"
        elif size % _PAGE:
            yield f"GPU {index} had {size} bytes in use: a card hands out whole pages"
    for card in cards:
        if not card.used:
            yield f"GPU {card.index} was calibrated, and read at no phase"
        ledger = _ledger(one, card.index)
        least = card.before + _bytes(ledger, "weights") + _bytes(ledger, "kv_cache") // 2
        if any(size < least for size in card.used.values()):
            yield f"GPU {card.index} had less in use than its weights and half its cache take"


def _forecasts(one: SharedRun) -> Iterator[str]:
    """Yield what was measured exactly as forecast, which does not happen on a real card."""
    same = {
        figure.what
        for _, figure in one.run.rows
        if figure.unit == "bytes" and abs(figure.forecast - figure.actual) <= _SAME
    }
    same |= {row["phase"] for row in one.phases if abs(row["over"]) <= _SAME}
    for what in sorted(same):
        yield f"{what} was measured as it was forecast, to {_SAME} bytes"
    if any(row["phase"] == _CONTEXT and _whole(row["over"]) for row in one.phases):
        yield "what came before the cache is off by whole MiB: a card's context is not"
    for gpu in one.plan.ledgers:
        if _bytes(gpu, "cuda_context") in _steps(one, str(gpu.index)):
            yield f"the context on GPU {gpu.index} took what the preset says, to the byte"
    for seen in one.seen:
        if seen.free is not None and seen.region is not None and seen.region > seen.free:
            yield "its cache is larger than what was free"


def _whole(size: int) -> bool:
    """Return whether a size is a whole number of MiB, but for rounding in the engine's log."""
    return abs((size + MIB // 2) % MIB - MIB // 2) <= _ROUNDED


def _steps(one: SharedRun, gpu: str) -> set[int]:
    """Return all growths of a GPU's bytes in use between two moments of a start."""
    used = [[moment.used.get(gpu, 0) for moment in start.moments] for start in one.run.attempts]
    return {later - before for sizes in used for before, later in combinations(sizes, 2)}


def _speeds(one: SharedRun) -> Iterator[str]:
    """Yield what was faster than the link of the card allows."""
    plan = one.plan
    first = plan.machine.gpu(plan.groups[0][0])
    weights = _bytes(_ledger(one, first.index), "weights")
    link = _link(first.pcie)
    for attempt in one.run.attempts:
        for engine in attempt.engines:
            seconds = engine.seconds.get("weights", 0.0)
            if link is not None and weights > _ROOM * link * max(seconds, 0.01):
                yield f"{weights // MIB} MiB of weights came in {seconds} s over its PCIe link"


def _link(pcie: Pcie) -> float | None:
    if not isinstance(pcie.generation, int) or not isinstance(pcie.width, int):
        return None
    return _LANE.get(pcie.generation, _LANE[6]) * pcie.width


def _ledger(one: SharedRun, index: int) -> GpuLedger:
    return next(gpu for gpu in one.plan.ledgers if gpu.index == index)


def _bytes(ledger: GpuLedger, name: str) -> int:
    """Return the bytes of a phase or of one term."""
    return sum(term.bytes for term in ledger.terms if name in (term.phase, term.term))
