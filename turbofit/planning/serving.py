"""A plan in one line, without sentences, as in `turbofit which`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec.structs import replace

from turbofit.core.messages import plural
from turbofit.core.struct import Struct, doc, known
from turbofit.core.units import three_digits
from turbofit.memory.engines import LMDEPLOY
from turbofit.planning.choose import choose, known_warnings, why_not
from turbofit.planning.explain.plan_document import requests_held
from turbofit.planning.explain.reasons import unkept
from turbofit.planning.resolved_request import ResolvedRequest, vision_load_of
from turbofit.planning.search.search import EngineFit
from turbofit.planning.search.sizing import excess_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.machine import Machine
    from turbofit.planning.request import WhichRequest
    from turbofit.planning.verdict import Planned


class Serving(Struct):
    """One model on one machine: what `turbofit plan` finds there, in short."""

    model: str
    on: Annotated[str, doc("The machine, as --on takes it.")]
    gpus: Annotated[int, doc("GPUs of the machine.")]
    bytes: Annotated[int, doc("Bytes of all of them.")]
    keeps: Annotated[bool, doc("Whether the plan fits, with all that was asked.")]
    why_not: Annotated[str, doc("What is missing; empty where the promise is kept.")] = ""
    missing: Annotated[int, doc("Bytes that the tightest GPU lacks at least; else 0.")] = 0
    engine: Annotated[str | None, doc("Null where no engine can be asked.")] = None
    tp: Annotated[int, doc("GPUs of one engine.")] = 0
    replicas: Annotated[int, doc("Engines side by side.")] = 0
    kv_tokens: Annotated[int, doc("KV tokens of all engines.")] = 0
    context: Annotated[int, doc("Tokens that one request may have.")] = 0
    image_limit: Annotated[int | None, doc("Tiles or pixels of an image; null: no images.")] = None
    requests_at_once: int = 0
    requests_per_second: Annotated[float | None, doc("A forecast; null: none.")] = None
    output_tokens_per_second: float | None = None
    seconds_to_first_token: float | None = None
    warnings: Annotated[tuple[str, ...], doc("What is known to go wrong with it.")] = ()

    @property
    def of_lmdeploy(self) -> bool:
        """Whether LMDeploy runs it; Transformers would run one request after the other."""
        return self.engine in LMDEPLOY


def blank_line(model: str, on: str, machine: Machine, why_not: str = "") -> Serving:
    """The line of a model on a machine without a plan, with the reason if none is possible."""
    total = sum(known(machine.gpu(index).total, 0) for index in machine.visible)
    return Serving(
        model=model, on=on, gpus=len(machine.visible), bytes=total, keeps=False, why_not=why_not
    )


def serving(request: WhichRequest, resolved: ResolvedRequest, blank: Serving) -> Serving:
    """The short form of a request's plan, from the same search; ``blank`` is its line without plan.

    Raises:
        TurbofitError: as `turbofit.planning.plan.plan`.
    """
    chosen = choose(resolved, request.engine)
    if isinstance(chosen, EngineFit):
        row, tokens, speed = _of_fit(blank, chosen), chosen.tokens, chosen.throughput
    else:
        row, tokens, speed = _of_planned(blank, chosen), chosen.document.kv.tokens, None
    if row.why_not:
        return row
    if speed is not None:
        row = replace(
            row,
            requests_per_second=speed.requests_per_second,
            output_tokens_per_second=speed.output_tokens_per_second,
            seconds_to_first_token=speed.seconds_to_first_token,
        )
    why_not = next(_lacks(request, resolved, row, tokens), "")
    return replace(row, keeps=not why_not, why_not=why_not)


def _of_fit(blank: Serving, fit: EngineFit) -> Serving:
    shape = fit.best.shape
    row = replace(blank, engine=fit.engine.name, tp=shape.tp, replicas=shape.replicas)
    if not fit.fits:
        return replace(row, why_not=why_not(fit), missing=fit.best.short)
    tokens = [account.tokens_at(account.ratio) for account in fit.accounts]
    return replace(
        row,
        kv_tokens=sum(tokens),
        context=fit.best.settings.session_len,
        image_limit=fit.image_limit,
        requests_at_once=requests_held(fit.accounts, tokens, fit.best.vision_load),
        warnings=(*fit.request.model.warnings, *known_warnings(fit)),
    )


def _of_planned(blank: Serving, planned: Planned) -> Serving:
    """The line of an engine whose plan is made without a search: Transformers."""
    plan = planned.document
    row = replace(
        blank,
        engine=plan.engine.name,
        tp=max(map(len, plan.parallel.groups)),
        replicas=plan.parallel.replicas,
        why_not=planned.verdict.reason,
        missing=max(0, *(gpu.margin - gpu.headroom for gpu in plan.gpus)),
    )
    if not planned.fits:
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
    """Yield requirements that are not fully kept; ``tokens`` are those of the smallest cache."""
    rule, requested, image_limit = (
        resolved.model.image_rule,
        resolved.requested_image_limit,
        row.image_limit,
    )
    if rule is not None and requested is not None and image_limit not in (None, requested):
        larger = vision_load_of(resolved, image_limit + rule.limit_step)
        if not excess_tokens(resolved, larger):  # else no context holds larger images
            unit = plural(requested, rule.limit_unit.removesuffix("s"))
            yield f"serves images of {image_limit:,} {unit} at most, not {requested:,}"
    yield from unkept(resolved, row.context or 0, tokens)
    wanted, speed = request.images_per_second, row.requests_per_second
    if wanted is None:
        return
    if speed is None:
        yield "has no forecast of speed"
    elif speed * request.images < wanted:
        yield f"{three_digits(speed * request.images)} images/s by the forecast, not {wanted:g}"
