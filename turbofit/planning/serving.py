"""A plan in short, without its sentences: one line of `turbofit which`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Gpu
from turbofit.core.messages import plural
from turbofit.core.plan import Plan, Throughput
from turbofit.core.struct import known
from turbofit.core.units import GIB, three_digits
from turbofit.core.which import Serving
from turbofit.memory.account import Engine
from turbofit.memory.engines import LMDEPLOY, engine_for
from turbofit.model.families.engines import engine_problem
from turbofit.planning.request import WhichRequest
from turbofit.tuner.choose import choose, why_not
from turbofit.tuner.explain.reasons import pace_words, unkept
from turbofit.tuner.resolved_request import ResolvedRequest, launch_of, vision_load_of
from turbofit.tuner.search.search import EngineFit
from turbofit.tuner.search.shapes import PREFILL_SIZES, Shape, chosen_dtype, shape_settings

__all__ = ["far_too_large", "serving"]

#: Bytes by which the weights alone must miss a GPU before no search is made. A larger degree takes
#: more for its communicator than a smaller one, by less than this.
_FAR: Final = 2 * GIB
_LARGEST_TP: Final = 8


def serving(request: WhichRequest, resolved: ResolvedRequest, on: str) -> Serving:
    """The plan for a request in short, by the same search.

    Args:
        request: what is asked, its model and its machine included.
        resolved: the same, resolved.
        on: how the machine is called.

    Raises:
        TurbofitError: as `turbofit.planning.plan.plan`.
    """
    blank = Serving(
        model=resolved.model.name,
        on=on,
        gpus=len(resolved.machine.visible),
        bytes=sum(known(gpu.total, 0) for gpu in resolved.visible),
        keeps=False,
    )
    chosen = choose(resolved, request.engine)
    row = _of_plan(blank, chosen) if isinstance(chosen, Plan) else _of_fit(blank, chosen)
    if row.why_not:
        return row
    tokens = chosen.kv.tokens if isinstance(chosen, Plan) else chosen.tokens
    why_not = _smaller(resolved, row) or _unkept(resolved, row, tokens) or _slower(request, row)
    if not why_not and resolved.pace is not None:
        if isinstance(chosen, Plan):
            why_not = "has no forecast of speed"
        elif chosen.best.slow:
            why_not = pace_words(resolved, chosen.best)
    return replace(row, keeps=not why_not, why_not=why_not)


def far_too_large(request: WhichRequest, resolved: ResolvedRequest) -> int:
    """Bytes that the GPUs lack for weights and contexts alone, on any engine; 0 where not far.

    Under: the cache and all else come on top, and many that do not fit are not told by this.
    """
    try:
        first = engine_for(resolved.model, request.engine)
        if first.planned.serial:
            return 0
        auto = [name for name in LMDEPLOY if engine_problem(resolved.model, name) is None]
        names = auto if request.engine == "auto" else [first.name]
        lacking = min(_lacking(resolved, name) for name in names)
    except TurbofitError:
        return 0
    return lacking if lacking > _FAR else 0


def _lacking(resolved: ResolvedRequest, name: str) -> int:
    """What an engine lacks on the freest GPUs, at the degree that needs the least of each.

    Equal GPUs have the least where the model is split the most; of unequal ones a single large GPU
    may hold what no part of a small one does.
    """
    engine = engine_for(resolved.model, name)
    freest = sorted(resolved.visible, key=lambda gpu: -known(gpu.free, 0))
    most = min(len(freest), _LARGEST_TP)
    tried = range(1, most + 1) if resolved.tp is None else (resolved.tp,)
    degrees = [tp for tp in tried if tp <= most and not engine.tp_problem(resolved.model, tp)]
    if not degrees:
        return 0
    if freest[0].free == freest[degrees[-1] - 1].free:
        degrees = degrees[-1:]
    return min(_lacking_on(resolved, engine, freest[:tp]) for tp in degrees)


def _lacking_on(resolved: ResolvedRequest, engine: Engine, gpus: Sequence[Gpu]) -> int:
    """What one engine lacks on these GPUs."""
    dtype = chosen_dtype(resolved.model, resolved.fixed.get("dtype"), gpus)
    shape = Shape(
        tp=len(gpus),
        groups=(tuple(gpu.index for gpu in gpus),),
        max_prefill_token_num=PREFILL_SIZES[-1],
        limit=resolved.requested_limit,
        dtype=dtype,
        at_once=1,
    )
    settings = shape_settings(resolved, shape, PREFILL_SIZES[-1])
    vision_load = vision_load_of(resolved, resolved.requested_limit)
    return -engine.account(launch_of(resolved, settings, gpus, vision_load)).free


def _of_fit(blank: Serving, fit: EngineFit) -> Serving:
    shape, each = fit.best.shape, [(one, one.settings) for one in fit.accounts]
    row = replace(blank, engine=fit.engine.name, tp=shape.tp, replicas=shape.replicas)
    if not fit.fits:
        return replace(row, why_not=why_not(fit), missing=fit.best.short)
    row = replace(
        row,
        kv_tokens=sum(
            account.tokens_at(options.cache_max_entry_count) for account, options in each
        ),
        context=fit.best.settings.session_len,
        image_limit=fit.limit,
        requests_at_once=sum(options.max_batch_size for _, options in each),
    )
    return _with_speed(row, fit.throughput)


def _of_plan(blank: Serving, plan: Plan) -> Serving:
    """Of an engine whose plan is made at once: Transformers."""
    why_not = "" if plan.fits else plan.verdict.removeprefix("does not fit: ")
    row = replace(
        blank,
        engine=plan.engine.name,
        tp=max(map(len, plan.parallel.groups)),
        replicas=plan.parallel.replicas,
        why_not=why_not.removeprefix(f"{plan.model.name}: "),
        missing=max(0, *(gpu.margin - gpu.headroom for gpu in plan.gpus)),
    )
    if not plan.fits:
        return row
    row = replace(
        row,
        kv_tokens=plan.kv.total_tokens,
        context=plan.settings.session_len,
        image_limit=plan.limits.image_limit,
        requests_at_once=plan.requests_at_once,
    )
    return _with_speed(row, plan.throughput)


def _with_speed(row: Serving, speed: Throughput | None) -> Serving:
    if speed is None:
        return row
    return replace(
        row,
        requests_per_second=speed.requests_per_second,
        output_tokens_per_second=speed.output_tokens_per_second,
        seconds_to_first_token=speed.seconds_to_first_token,
    )


def _smaller(resolved: ResolvedRequest, row: Serving) -> str:
    """Whether images must be smaller than was asked, in words."""
    rule, requested = resolved.model.image_rule, resolved.requested_limit
    if rule is None or requested is None or row.image_limit in (None, requested):
        return ""
    unit = plural(requested, rule.limit_unit.removesuffix("s"))
    return f"serves images of {row.image_limit:,} {unit} at most, not {requested:,}"


def _unkept(resolved: ResolvedRequest, row: Serving, tokens: int) -> str:
    """What else was asked and is not kept whole, in words; ``tokens`` of the smallest cache."""
    return next(unkept(resolved, row.context or 0, tokens), "")


def _slower(request: WhichRequest, row: Serving) -> str:
    """Whether fewer images a second are forecast than were asked, in words."""
    wanted = request.images_per_second
    if wanted is None:
        return ""
    if row.requests_per_second is None:
        return "has no forecast of speed"
    rate = row.requests_per_second * request.images
    return (
        "" if rate >= wanted else f"{three_digits(rate)} images/s by the forecast, not {wanted:g}"
    )
