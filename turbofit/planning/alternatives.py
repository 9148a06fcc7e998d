"""What a plan says of choices beside its own: the other size of a card, and without an option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, option_of
from turbofit.core.messages import counted
from turbofit.core.plan import Plan
from turbofit.core.units import two_digits
from turbofit.machine.presets import other_sizes
from turbofit.machine.spec import in_other_size
from turbofit.planning.choose import best_plan, choose, promise_of
from turbofit.planning.reasons import FAR
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.verdict import Planned

#: The options of a shape, each with the value by which turbofit chooses.
_SHAPE: Final = {"tp": None, "replicas": None, "engine": "auto", "max_batch_size": None}
#: The beginning of the sentence on a plan without the options of its shape.
WITHOUT: Final = "without --"


def alternatives(plan: Plan, request: PlanRequest) -> Iterator[str]:
    """Yield a sentence for each choice with another verdict, or with far more requests."""
    yield from _in_other_sizes(plan, request)
    yield from _without_options(plan, request)


def _in_other_sizes(plan: Plan, request: PlanRequest) -> Iterator[str]:
    """Yield the verdict on a card of the same name and another size, where it is another verdict.

    A larger card is planned if ``plan`` does not fit, a smaller card if it fits.
    """
    if not isinstance(request.on, str):
        return
    for size in other_sizes(plan.machine.warnings):
        if (size.gigabytes > size.taken) == plan.fits:
            continue
        try:
            changed = request.changed(on=in_other_size(plan.machine.name, size))
            found = choose(resolve(changed), request.engine)
        except TurbofitError:
            continue
        if found.fits == plan.fits:
            continue
        if not found.fits:
            yield f"on {size.spec}: does not fit"
            continue
        promise = found.document.promise if isinstance(found, Planned) else promise_of(found)
        requests = promise.requests
        yield f"on {size.spec}: fits, {counted(requests, 'request')} at once"


def _without_options(plan: Plan, request: PlanRequest) -> Iterator[str]:
    """Yield what turbofit would choose in place of the given shape, if that serves far more.

    The other plan keeps the same context and image limit. Requests are photographs, or without
    images texts; where a speed is not known, the KV tokens of all engines are compared.
    """
    given = [name for name in request.given() if name in _SHAPE]
    if not given or not plan.fits or request.goal == "latency" or request.least:
        return
    changes = {name: _SHAPE[name] for name in given}
    try:
        resolved = resolve(request.changed(**changes)).keeping(plan.promise)
        other = best_plan(replace(resolved, compares_limits=False))
    except TurbofitError:
        return
    if other.fits and (gain := _gain(plan, other)):
        options = " ".join(f"{option_of(name)} {getattr(request, name)}" for name in given)
        yield f"{WITHOUT}{options[2:]}: {_shape_words(plan, other)}, {gain}, same promise"


def _gain(plan: Plan, other: Plan) -> str:
    """Return how many times the requests or KV tokens another plan has; empty if not far more."""
    here, there = _requests_per_second(plan), _requests_per_second(other)
    what = "requests/s"
    if here is None or there is None:
        here, there, what = plan.kv_tokens, other.kv_tokens, "KV tokens"
    return "" if here >= FAR * there else f"{two_digits(there / here)} times the {what}"


def _shape_words(plan: Plan, other: Plan) -> str:
    """Return how the engines of another plan differ from the engines of ``plan``, in words."""
    words = f"{other.replicas} engines" if other.replicas > 1 else f"tp {other.tp}"
    if (other.tp, other.replicas) == (plan.tp, plan.replicas):
        batch = max(engine.settings.max_batch_size for engine in other.engines)
        words = f"a batch of {batch}"
    return words if other.backend.name == plan.backend.name else f"{words} of {other.backend.name}"


def _requests_per_second(plan: Plan) -> float | None:
    """Return the forecast of a plan for photographs, or else for its own requests, if known."""
    if plan.usual_image:
        return plan.usual_image.requests_per_second
    return None if plan.throughput is None else plan.throughput.requests_per_second
