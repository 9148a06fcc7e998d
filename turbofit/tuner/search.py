"""The search: every legal shape, the workload served first, then the goal.

Tiers, best first: the asked limit with the engine's own bound paid for, so that nothing queues;
the asked limit with less paid for, where the gateway must queue; smaller limits. The first tier in
which any shape serves decides; within it the best rank wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu
from turbofit.core.model import PatchRule, TileRule
from turbofit.core.struct import Struct
from turbofit.memory.exposure import Exposure, engine_bound
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.tuner.ask import Ask, exposure_of
from turbofit.tuner.candidates import Judged, Shape, judge, shape_settings
from turbofit.tuner.constraints import (
    communicator_problem,
    dtype_for,
    dtype_problem,
    settings_problem,
    tp_problem,
)
from turbofit.tuner.groups import groupings, kinds

__all__ = ["PREFILL_SIZES", "Found", "search", "shapes"]

PREFILL_SIZES = (8192, 4096, 2048, 1024)
_LARGEST_TP = 8


class Found(Struct):
    """The search's answer: the best shape (which may not fit) and what else was looked at."""

    best: Judged
    judged: tuple[Judged, ...]
    asked: Exposure


def search(ask: Ask, constants: EngineConstants) -> Found:
    """The best plan for what was asked.

    Raises:
        UsageError: an option of the user's cannot be used on this machine or by this model.
    """
    asked = exposure_of(ask, ask.own_limit)
    found = list(shapes(ask))
    if not found:
        raise UsageError(_no_shape(ask), hint="let turbofit choose --tp and --replicas")
    judged = [_judge(ask, shape, ask.own_limit, asked, constants) for shape in found]
    best = max(judged, key=_order)
    if best.fits:
        return Found(best=best, judged=tuple(judged), asked=asked)
    for tier in (_queued, _lowered):
        more = [_result for shape in found for _result in tier(ask, shape, asked, constants)]
        judged += more
        fitting = [one for one in more if one.fits]
        if fitting:
            return Found(best=max(fitting, key=_order), judged=tuple(judged), asked=asked)
    return Found(best=best, judged=tuple(judged), asked=asked)


def shapes(ask: Ask) -> Iterator[Shape]:
    """Every shape that LMDeploy could run here, at the asked limit."""
    fixed_prefill = ask.fixed.get("max_prefill_token_num")
    prefills = (fixed_prefill,) if isinstance(fixed_prefill, int) else PREFILL_SIZES
    for gpus in kinds(ask.visible):
        for tp in _tps(ask, len(gpus)):
            # MIG instances have no peers, so NCCL cannot join them.
            if tp_problem(ask.model, tp) or (tp > 1 and gpus[0].mig):
                continue
            for replicas in _replicas(ask, len(gpus) // tp):
                for groups in groupings(ask.machine, gpus, tp, replicas):
                    for prefill in prefills:
                        yield Shape(
                            tp=tp,
                            groups=groups,
                            max_prefill_token_num=prefill,
                            limit=ask.own_limit,
                        )


def _judge(
    ask: Ask, shape: Shape, limit: int | None, asked: Exposure, constants: EngineConstants
) -> Judged:
    shape = replace(shape, limit=limit)
    gpus = [ask.machine.gpu(index) for group in shape.groups for index in group]
    dtype = _dtype(ask, gpus)
    exposure = asked if limit == ask.own_limit else exposure_of(ask, limit)
    _check(ask, shape, dtype, exposure, constants)
    return judge(ask, shape, dtype, exposure, asked, constants)


def _queued(
    ask: Ask, shape: Shape, asked: Exposure, constants: EngineConstants
) -> Iterator[Judged]:
    """The asked limit, paying for as many units in one forward as fit, at least one request's."""
    yield from _paying(ask, shape, ask.own_limit, asked, constants)


def _paying(
    ask: Ask, shape: Shape, limit: int | None, asked: Exposure, constants: EngineConstants
) -> Iterator[Judged]:
    rule = ask.model.image_rule
    if rule is None or not asked.units_per_image:
        return
    exposure = exposure_of(ask, limit)
    step = 1 if isinstance(rule, TileRule) else rule.merge**2

    def at(units: int) -> Judged:
        return _judge(ask, replace(shape, units_per_forward=units), limit, asked, constants)

    low = exposure.units_per_request
    best = at(low)
    if not best.fits:
        yield best
        return
    high = max(low, engine_bound(rule, exposure, best.settings))
    yield _largest(best, low, high, step, at)


def _lowered(
    ask: Ask, shape: Shape, asked: Exposure, constants: EngineConstants
) -> Iterator[Judged]:
    """The largest limit that serves; it pays for the engine's bound where that fits too."""
    rule, own = ask.model.image_rule, ask.own_limit
    user_set = ask.max_dynamic_patch is not None or ask.max_pixels is not None
    if rule is None or own is None or user_set or ask.workload.image_size is not None:
        return
    step = (rule.patch_size * rule.merge) ** 2 if isinstance(rule, PatchRule) else 1
    least = max(step, rule.min_pixels) if isinstance(rule, PatchRule) else rule.min_dynamic_patch

    def at(limit: int) -> Judged:
        units = exposure_of(ask, limit).units_per_request
        return _judge(ask, replace(shape, units_per_forward=units), limit, asked, constants)

    lowest = at(least)
    if not lowest.fits:
        yield lowest
        return
    largest = _largest(lowest, least, own - step, step, at)
    full = _judge(ask, shape, largest.shape.limit, asked, constants)
    yield full if full.fits else largest


def _largest(best: Judged, low: int, high: int, step: int, at: Callable[[int], Judged]) -> Judged:
    """Bisect for the largest value that fits; ``low`` is known to."""
    low_steps, high_steps = 0, (high - low) // step
    while low_steps < high_steps:
        middle = (low_steps + high_steps + 1) // 2
        tried = at(low + middle * step)
        if tried.fits:
            best, low_steps = tried, middle
        else:
            high_steps = middle - 1
    return best


def _order(judged: Judged) -> tuple[object, ...]:
    """Fitting shapes by rank; those that do not fit by how little is missing."""
    indices = tuple(-index for group in judged.shape.groups for index in group)
    if judged.fits:
        return (1, *judged.rank, indices)
    return (0, -judged.short, -judged.shape.tp, judged.shape.max_prefill_token_num, indices)


def _tps(ask: Ask, gpus: int) -> Sequence[int]:
    if ask.tp is not None:
        return (ask.tp,) if ask.tp <= gpus else ()
    return range(1, min(gpus, _LARGEST_TP) + 1)


def _replicas(ask: Ask, most: int) -> Sequence[int]:
    if ask.replicas is not None:
        return (ask.replicas,) if ask.replicas <= most else ()
    return range(1, most + 1)


def _dtype(ask: Ask, gpus: Sequence[Gpu]) -> str:
    fixed = ask.fixed.get("dtype")
    if isinstance(fixed, str) and fixed != "auto":
        problem = dtype_problem(ask.model, fixed, gpus)
        if problem:
            raise UsageError(
                problem, hint="leave --dtype out: float16 is chosen where it is needed"
            )
        return fixed
    return dtype_for(ask.model, gpus)[0]


def _check(
    ask: Ask, shape: Shape, dtype: str, exposure: Exposure, constants: EngineConstants
) -> None:
    """Refuse what the user fixed and LMDeploy would abort on.

    Raises:
        UsageError: naming the option.
    """
    settings = shape_settings(ask, shape, ask.model.text.max_position_embeddings, dtype)
    problem = settings_problem(settings, constants)
    for group in shape.groups:
        gpus = [ask.machine.gpu(index) for index in group]
        problem = problem or communicator_problem(ask.model, settings, exposure, ask.machine, gpus)
    if problem:
        raise UsageError(problem, hint="leave the option out, or change it")


def _no_shape(ask: Ask) -> str:
    """Why there is no shape at all."""
    count = len(ask.visible)
    if ask.tp is not None:
        problem = tp_problem(ask.model, ask.tp)
        if problem:
            return f"--tp {ask.tp} is not possible for {ask.model.name}: {problem}"
        need = ask.tp * (ask.replicas or 1)
        largest = max((len(kind) for kind in kinds(ask.visible)), default=0)
        return f"--tp {ask.tp} needs {need} equal GPUs; there are {largest} of {count} visible"
    if ask.replicas is not None and ask.replicas > count:
        return f"--replicas {ask.replicas} needs as many GPUs; {count} are visible"
    return f"no tensor-parallel degree suits {ask.model.name} on {count} GPUs"
