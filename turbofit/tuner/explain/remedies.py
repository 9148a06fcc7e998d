"""What would make it fit, cheapest first, each computed by planning again with the change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from turbofit.core.draft import Draft
from turbofit.core.errors import TurbofitError
from turbofit.core.messages import option_of
from turbofit.core.plan import Remedy
from turbofit.core.units import GIB, format_bytes, round_up
from turbofit.memory.engine import Engine
from turbofit.model.presets import awq_variant
from turbofit.tuner.engine_fit import EngineFit, fit_of, fit_on_host
from turbofit.tuner.explain.other_machines import MORE_GPUS, larger, stopped, with_more_gpus
from turbofit.tuner.explain.plan_document import host_short
from turbofit.tuner.resolved_request import ResolvedRequest, vision_load_of
from turbofit.tuner.search.context import MIN_TEXT_TOKENS, excess_tokens

__all__ = ["Change", "Remedies", "left_to_turbofit", "remedies"]

#: A change that closes less of the gap than one percent helps nobody.
_WORTH_SAYING = 0.99
_QUANT: tuple[tuple[int, str], ...] = ((8, "int8"), (4, "int4"))


class Remedies(NamedTuple):
    """What helps, and which of the person's own options each keep it from fitting by themselves."""

    remedies: tuple[Remedy, ...]
    causes: tuple[str, ...]


class Change(NamedTuple):
    """One change; ``released`` is the person's own option that it takes back, as it was written."""

    change: str
    request: ResolvedRequest
    released: str = ""


def remedies(fit: EngineFit) -> Remedies:
    """Changes for a plan that does not fit, with what each would do.

    Those that make it fit come first, in order of cost; of the others only the ones that come
    closer are kept.
    """
    request, best = fit.request, fit.found.best
    fitting: list[Remedy] = []
    closer: list[Remedy] = []
    causes: list[str] = []
    for change, changed, released in _changes(request):
        if changed.machine.name == MORE_GPUS and (fitting or best.fits):
            continue  # fewer such cards do already, or no memory of a GPU is short
        try:
            made = fit_on_host(changed, fit.engine)
        except TurbofitError:
            continue
        if made.fits:
            fitting.append(Remedy(change=change, effect=_fits(made)))
            causes += [released] if released else []
        elif effect := _closer(fit, made):
            closer.append(Remedy(change=change, effect=effect))
    if best.fits:
        fitting.append(_more_host_memory(fit))
    elif not fitting:
        fitting += _larger_cards(request, fit.engine)
    return Remedies((*fitting, *closer), tuple(causes))


def _closer(fit: EngineFit, made: EngineFit) -> str:
    """What a change comes to that is not enough alone, in words; empty where it helps nobody."""
    best, result = fit.found.best, made.found.best
    if result.fits:
        if not best.fits:
            return _on_gpus_alone(made)
        less = host_short(made.host) < host_short(fit.host) * _WORTH_SAYING
        return f"not enough alone: {made.host_problem}" if less else ""
    if excess_tokens(made.request, result.vision_load):
        return ""  # no memory is short: the images are longer than the context
    if excess_tokens(fit.request, best.vision_load):
        return f"the images fit the context then, and {format_bytes(result.short)} are short"
    if result.short < best.short * _WORTH_SAYING:
        return (
            f"not enough alone: {format_bytes(result.short)} short"
            f" instead of {format_bytes(best.short)}"
        )
    return ""


def _more_host_memory(fit: EngineFit) -> Remedy:
    """Host memory for one engine, of what the GPUs hold."""
    made = fit
    if fit.request.replicas is None and fit.found.best.shape.replicas > 1:
        try:
            one = fit_of(replace(fit.request, replicas=1), fit.engine)
        except TurbofitError:
            one = fit
        made = one if one.found.best.fits else fit
    size = format_bytes(round_up(host_short(made.host), GIB))
    return Remedy(change=f"free {size} of host RAM", effect=_fits(made))


def _larger_cards(request: ResolvedRequest, engine: Engine) -> Iterator[Remedy]:
    """The smallest cards of another kind that do, as many as there are."""
    for change, changed in larger(request):
        try:
            made = fit_on_host(changed, engine)
        except TurbofitError:
            continue
        if made.found.best.fits:
            effect = _fits(made) if made.fits else _on_gpus_alone(made)
            yield Remedy(change=change, effect=effect)
            return


def _changes(request: ResolvedRequest) -> Iterator[Change]:
    """Single changes, cheapest first."""
    yield from _released_options(request)
    yield from _smaller_workload(request)
    yield from _smaller_images(request)
    yield from _quantised_cache(request)
    yield from _other_checkpoint(request)
    yield from _more_gpus(request)
    yield from (Change(*change) for change in stopped(request))


def left_to_turbofit(request: ResolvedRequest) -> Iterator[Change]:
    """Each option that the user fixed, and the budget, left out."""
    for name in request.fixed:
        rest = {key: value for key, value in request.fixed.items() if key != name}
        option = option_of(name)
        # turbofit chooses a value of every other option, and never a draft.
        out = "out" if name == "speculative" else "to turbofit"
        yield Change(
            f"leave {option} {out}",
            replace(request, fixed=rest),
            _written(option, request.fixed[name]),
        )
    if request.budget is not None:
        given = request.budget
        budget = f"--budget {given if isinstance(given, str) else format_bytes(given)}"
        yield Change("leave --budget out", replace(request, budget=None), budget)


def _usual_margin(request: ResolvedRequest) -> Iterator[Change]:
    """The default margin, where a person asks for far more: its double is turbofit's own too.

    So much is left where LMDeploy is newer than the account.
    """
    margin = request.margin
    if margin.bytes is None and margin.share is None:
        return
    usual = replace(margin, bytes=None, share=None)
    most, given = (max(map(one.of, request.visible)) for one in (usual, margin))
    if given <= 2 * most:
        return
    share = f"{(margin.share or 0) * 100:.6g}%"
    written = share if margin.bytes is None else format_bytes(margin.bytes)
    yield Change(
        "leave --margin to turbofit", replace(request, margin=usual), f"--margin {written}"
    )


def _released_options(request: ResolvedRequest) -> Iterator[Change]:
    """Each option that the user fixed, left to turbofit."""
    yield from left_to_turbofit(request)
    yield from _usual_margin(request)
    if request.replicas is not None and request.replicas > 1:
        # Copies need whole models on their cards; one model may be split over the same cards.
        copies = f"--replicas {request.replicas}"
        yield Change("leave --replicas to turbofit", replace(request, replicas=None), copies)


def _smaller_workload(request: ResolvedRequest) -> Iterator[Change]:
    workload = request.workload
    if (workload.concurrency or 1) > 1 and "max_batch_size" not in request.fixed:
        fewer = replace(workload, concurrency=1)
        yield Change("--concurrency 1", replace(request, workload=fewer))
    if workload.context is not None:
        shorter = replace(workload, context=None)
        yield Change(
            "leave --context to what the cache holds",
            replace(request, workload=shorter),
            f"--context {workload.context}",
        )
    requested_load = vision_load_of(request, request.requested_limit)
    excess = excess_tokens(request, requested_load)
    if excess:
        each = requested_load.tokens_per_request // requested_load.images_per_request
        count = workload.images - -(-excess // each)
        if count > 1:
            fewer = replace(workload, images=count)
            yield Change(f"--images {count}", replace(request, workload=fewer))
    if workload.images > 1:
        one = replace(workload, images=1)
        images = f"--images {workload.images}"
        yield Change("--images 1", replace(request, workload=one), images)


def _smaller_images(request: ResolvedRequest) -> Iterator[Change]:
    """Half the user's own limit; the search has tried every one where it was free to."""
    rule, requested = request.model.image_rule, request.requested_limit
    if rule is None or requested is None or requested <= 1 or request.fixed_limit is None:
        return
    limit = f"{rule.limit_option} {requested}"
    yield Change(f"leave {rule.limit_option} to turbofit", request.with_limit(None), limit)
    yield Change(f"{rule.limit_option} {requested // 2}", request.with_limit(requested // 2))


def _quantised_cache(request: ResolvedRequest) -> Iterator[Change]:
    if "quant_policy" in request.fixed:
        return
    for policy, name in _QUANT:
        yield Change(
            f"--quant-policy {policy} ({name} KV cache)",
            replace(request, fixed={**request.fixed, "quant_policy": policy}),
        )


def _other_checkpoint(request: ResolvedRequest) -> Iterator[Change]:
    variant = awq_variant(request.model)
    if variant is not None:
        fixed = dict(request.fixed)
        change = f"use {variant.hub_id or variant.name} (4-bit weights)"
        if fixed.get("dtype", "float16") != "float16":  # AWQ's kernels have no other
            del fixed["dtype"]
            change += ", and leave --dtype out"
        yield Change(change, replace(request, model=variant, fixed=fixed))


def _more_gpus(request: ResolvedRequest) -> Iterator[Change]:
    if request.tp is not None and len(request.visible) > request.tp:
        free = replace(request, tp=None, replicas=None)
        yield Change("leave --tp to turbofit", free, f"--tp {request.tp}")
    yield from (Change(*change) for change in with_more_gpus(request))


def _written(option: str, value: object) -> str:
    """An option as it stands on a command line."""
    if value is True:
        return option
    if isinstance(value, Draft):
        return " ".join(value.options)
    values = value if isinstance(value, list | tuple) else (value,)
    return " ".join((option, *map(str, values)))


def _fits(made: EngineFit) -> str:
    best = made.found.best
    effect = f"fits: {best.kv_tokens:,} KV tokens a group, tp {best.shape.tp}"
    if best.shape.limit is not None and best.shape.limit != made.request.requested_limit:
        effect += f", images lowered to {_limit(made.request, best.shape.limit)}"
    return effect


def _on_gpus_alone(made: EngineFit) -> str:
    return f"not enough alone: the GPUs hold it then, and {made.host_problem}"


def _limit(request: ResolvedRequest, limit: int) -> str:
    assert request.model.image_rule is not None
    unit = request.model.image_rule.limit_unit
    return f"{limit:,} {unit} (text beside them: {MIN_TEXT_TOKENS} tokens)"
