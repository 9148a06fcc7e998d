"""A plan in short, without its sentences: one line of `turbofit which`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Gpu
from turbofit.core.messages import plural
from turbofit.core.plan import Plan
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

#: Bytes by which the weights alone must miss a GPU before no search is made. A larger degree takes
#: more for its communicator than a smaller one, by less than this.
_FAR: Final = 2 * GIB
_LARGEST_TP: Final = 8


def serving(request: WhichRequest, resolved: ResolvedRequest, blank: Serving) -> Serving:
    """The plan for a request in short, by the same search.

    Args:
        request: what is asked, its model and its machine included.
        resolved: the same, resolved.
        blank: the line of this model and machine, without an answer.

    Raises:
        TurbofitError: as `turbofit.planning.plan.plan`.
    """
    chosen = choose(resolved, request.engine)
    if isinstance(chosen, Plan):
        row, tokens = _of_plan(blank, chosen), chosen.kv.tokens
    else:
        row, tokens = _of_fit(blank, chosen), chosen.tokens
    if row.why_not:
        return row
    speed = chosen.throughput
    if speed is not None:
        row = replace(
            row,
            requests_per_second=speed.requests_per_second,
            output_tokens_per_second=speed.output_tokens_per_second,
            seconds_to_first_token=speed.seconds_to_first_token,
        )
    why_not = next(_lacks(request, resolved, row, tokens), "")
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
    return replace(
        row,
        kv_tokens=sum(
            account.tokens_at(options.cache_max_entry_count) for account, options in each
        ),
        context=fit.best.settings.session_len,
        image_limit=fit.limit,
        requests_at_once=sum(options.max_batch_size for _, options in each),
    )


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
    return replace(
        row,
        kv_tokens=plan.kv.total_tokens,
        context=plan.settings.session_len,
        image_limit=plan.limits.image_limit,
        requests_at_once=plan.requests_at_once,
    )


def _lacks(
    request: WhichRequest, resolved: ResolvedRequest, row: Serving, tokens: int
) -> Iterator[str]:
    """What was asked and is not kept whole, in words; ``tokens`` of the smallest cache."""
    rule, requested = resolved.model.image_rule, resolved.requested_limit
    if rule is not None and requested is not None and row.image_limit not in (None, requested):
        unit = plural(requested, rule.limit_unit.removesuffix("s"))
        yield f"serves images of {row.image_limit:,} {unit} at most, not {requested:,}"
    yield from unkept(resolved, row.context or 0, tokens)
    wanted, speed = request.images_per_second, row.requests_per_second
    if wanted is None:
        return
    if speed is None:
        yield "has no forecast of speed"
    elif speed * request.images < wanted:
        yield f"{three_digits(speed * request.images)} images/s by the forecast, not {wanted:g}"
