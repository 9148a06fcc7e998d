"""Explains a plan's settings and margin, and computes the cost of its image limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import UNSET, UnsetType

from turbofit.core.forecast import UsualImage
from turbofit.core.machine import Gpu, named_cards
from turbofit.core.messages import SLOW_IMAGES, counted, plural
from turbofit.core.plan import PHOTOGRAPH, LimitCost
from turbofit.core.units import format_bytes
from turbofit.machine.presets import is_measured
from turbofit.memory.account import RATIO_STEPS, Account, Engine
from turbofit.memory.calibrated import calibration_reason, unbelieved
from turbofit.memory.engines import LMDEPLOY, engine_for
from turbofit.memory.known_bad import largest_batch
from turbofit.model.families.engines import engine_problem
from turbofit.planning.plan_document import requests_held
from turbofit.planning.resolved_request import (
    Margin,
    ResolvedRequest,
    photographs,
    vision_load_of,
)
from turbofit.planning.search.search import EngineFit, at_limit
from turbofit.planning.search.shapes import Evaluation, dtype_for
from turbofit.planning.search.sizing import longest_context, most_context
from turbofit.planning.throughput import forecast
from turbofit.planning.why_lost import forecast_name, speed_is_known

#: A choice that serves a smaller share than this of what another serves names the other.
FAR: Final = 2 / 3


def reasons(fit: EngineFit, account: Account) -> Iterator[str]:
    """Yield why each setting has its value.

    ``account`` is the account of the group with the most vision units in a forward.
    """
    request, best, engine = fit.request, fit.best, fit.engine
    if best.fits:
        yield _ratio_line(fit)
    if account.calibration is not None:
        yield calibration_reason(account.calibration)
    elif doubt := unbelieved(account.launch, engine.name, engine.version):
        yield doubt
    yield from _margin_line(fit)
    rank = "least memory" if request.least else "best rank"
    prefill = f"{rank} of the sizes tried{_encodings_words(fit)}"
    by_card = f"on each card the {rank} of the sizes tried"
    yield _setting_line(fit, "max_prefill_token_num", prefill, by_card=by_card)
    batch = _batch_reason(fit, account)
    yield _setting_line(fit, "max_batch_size", batch, by_card=batch)
    yield _setting_line(fit, "session_len", _session_len_reason(fit))
    if best.fits and request.engine_options.get("enable_prefix_caching"):
        yield "enable_prefix_caching: the plan counts no memory as saved by equal prompts"
    gpus = [request.machine.gpu(index) for index in best.shape.groups[0]]
    yield _setting_line(fit, "dtype", dtype_for(request.model, gpus)[1])
    if len(best.parts) > 1:
        yield (
            "each engine has the settings that serve most on its own card; all engines keep one"
            " promise of images and context, which the smallest cache holds"
        )
    if best.shape.image_limit is not None and best.vision_load.units_per_image:
        yield from _image_limit_line(request, best)
        bound = "the engine's own bound, so nothing queues"
        if best.shape.units_per_forward is not None:
            bound = "less than the engine could bring together, so the gateway must queue"
            bound += ", as you asked" if request.workload.queue_images else ""
            bound += ", and the cache gets the rest" if best.queues else ""
        units = account.units_per_forward
        yield f"the peak pays for {counted(units, 'vision unit')} in one forward: {bound}"


def _encodings_words(fit: EngineFit) -> str:
    """Say how often images are encoded because forwards split them; empty if no image is split."""
    images = fit.requested_load.images_per_request
    times = max((speed.encodings for speed in fit.best.speeds), default=0)
    if times <= images:
        return ""
    each = "the largest image is" if images == 1 else "the images of a request are"
    return f"; {each} encoded {times} times, once for each forward that holds some of it"


def slow_images(fit: EngineFit) -> Iterator[str]:
    """Yield a warning that images may be slow on the PyTorch engine."""
    if not fit.requested_load.units_per_image or fit.engine.name == LMDEPLOY[0]:
        return
    other, rival, model = LMDEPLOY[0], fit.rival, fit.request.model
    runs = not engine_problem(model, other) and (rival is None or rival.fits)
    runs = runs and not engine_for(model, other).missing_kernels(fit.accounts[0].launch)
    faster = f"; {other} may be ten times faster (--engine {other})" if runs else ""
    yield (
        f"{SLOW_IMAGES}: on an H100 it answered 2 requests of 2 to 12 megapixels in 20 s, TurboMind"
        " 22 in 15 s (docs/speed.md#images)"
        f"{faster}"
    )


def _setting_line(
    fit: EngineFit, name: str, why: str, *, value: str = "", by_card: str = ""
) -> str:
    """Return a line that says why a setting has its value.

    ``by_card`` replaces the reason ``why`` if groups of GPUs have different values.
    """
    if by_card and len({getattr(part.settings, name) for part in fit.best.parts}) > 1:
        return f"{name}: {by_card}"
    why = "as set by you" if name in fit.request.engine_options else why
    return f"{name} {value or getattr(fit.best.settings, name)}: {why}"


def _margin_line(fit: EngineFit) -> Iterator[str]:
    """Yield the margins and what they are based on, unless a person gave them.

    What a budget leaves to others is no margin.
    """
    margin, withheld = fit.request.margin, fit.request.withheld_of
    if margin.bytes is None and margin.share is None:
        kept = {
            size - withheld(gpu)
            for account in fit.accounts
            for gpu, size in zip(account.gpus, account.margins, strict=True)
        }
        sizes = " to ".join(map(format_bytes, sorted({min(kept), max(kept)})))
        yield f"margin {sizes}: {_margin_basis(margin, fit.accounts)}"


def _margin_basis(margin: Margin, accounts: Sequence[Account]) -> str:
    """Return what the margins of a plan are based on."""
    spreads = [account.calibration.spread for account in accounts if account.calibration]
    if len(spreads) == len(accounts):
        spread = format_bytes(max(spreads))
        return f"64 MiB, and the {spread} by which measurements of turbofit calibrate here differed"
    if margin.over is not None:
        more = f"{format_bytes(margin.over)} more than" if margin.over > 0 else "no more than"
        return f"a start proved this plan on these cards, and its engines took {more} forecast"
    why = "a rehearsal settled what LMDeploy allocates; " if margin.rehearsed else ""
    if margin.least and not margin.rehearsed:
        why = "the draft is counted, not rehearsed; "
    known = _libraries_known([gpu for account in accounts for gpu in account.gpus])
    return f"{why}contexts and libraries {known}"


def _libraries_known(gpus: Sequence[Gpu]) -> str:
    """Return how the memory of contexts and libraries on these cards is known."""
    unmeasured = named_cards(gpu for gpu in gpus if not is_measured(gpu))
    if not unmeasured:
        return "were measured on such a card (bench/gpu)"
    cards = "this card" if len({gpu.name for gpu in gpus}) == 1 else unmeasured
    measures = "(turbofit calibrate, or a start of turbofit serve, measures them)"
    return f"are estimates on {cards} {measures}"


def _ratio_line(fit: EngineFit) -> str:
    """Return the line that says why the cache ratio has its value."""
    request, best = fit.request, fit.best
    ratio, by_card = best.settings.cache_max_entry_count, "largest that leaves the margin"
    why = f"the largest that leaves the margin; {ratio + 1 / RATIO_STEPS:.3f} does not"
    if request.least:
        batch, context = best.settings.max_batch_size, best.settings.session_len
        need = f"{counted(batch, 'request')} of {context:,} tokens"
        kept, by_card = best.kv_tokens >= batch * context, "smallest that holds the promise"
        why = f"the smallest that holds {need}" if kept else f"the largest that fits; {need} do not"
    elif request.ratio_caps and ratio >= min(request.ratio_caps.values()):
        why = "lowered to what a rehearsal allows"
    by_card = f"on each card the {by_card}"
    return _setting_line(fit, "cache_max_entry_count", why, value=f"{ratio:.3f}", by_card=by_card)


def _batch_reason(fit: EngineFit, account: Account) -> str:
    """Return why the batch has its size."""
    request, best, requests = fit.request, fit.best, fit.request.workload.concurrency
    limit = largest_batch(account.launch, fit.engine.name, fit.engine.version)
    wants_more = requests is None or requests > best.shape.replicas * (limit or requests)
    if limit == best.settings.max_batch_size and wants_more and not request.least:
        return "with more at once a fault of LMDeploy ends the engine"
    if requests is not None:
        return _requested_batch_reason(fit, requests)
    if request.least:
        return "the least that serves"
    for_context = request.workload.goal == "context"
    kept = ", and cost at most 1% of the KV tokens" if for_context else ""
    if not best.vision_load.units_per_image:
        by = forecast_name(request, best)
        return f"the fewest that give 99% of the most requests a second by {by}{kept}"
    what = "photographs of {}x{}".format(*PHOTOGRAPH)
    if not speed_is_known(request, best):
        return f"as many {what} as the cache holds, as long as no more memory is needed{kept}"
    return (
        f"the fewest that give 99% of the most requests a second of {what} and of text by the"
        f" forecast, as long as no more memory is needed{kept}"
    )


def _requested_batch_reason(fit: EngineFit, requests: int) -> str:
    """Return how the batch follows from the given number of concurrent requests."""
    best, replicas = fit.best, fit.best.shape.replicas
    why = f"{requests} concurrent {plural(requests, 'request')} over"
    if best.held_requests and not best.fits:
        why = f"the most that the cache holds of {why}"
    by_card = ", by their cards" if len(best.parts) > 1 else ""
    return f"{why} {counted(replicas, 'replica')}{by_card}"


def _session_len_reason(fit: EngineFit) -> str:
    """Return why the context has its length."""
    request, session_len = fit.request, fit.best.settings.session_len
    longest = request.model.text.max_position_embeddings
    bounded = not (request.least or request.context_given or session_len >= longest)
    if bounded and session_len == longest_context(fit.served_request):
        images = fit.best.vision_load.units_per_image
        cost = ", which take cache if more images can meet in a forward" if images else ""
        return (
            f"enough for most requests; the model reads {longest}: --context asks for more"
            f" tokens{cost}"
        )
    held = "the smallest cache holds" if bounded and len(fit.best.parts) > 1 else "the cache holds"
    return context_reason(request, session_len, held)


def context_reason(request: ResolvedRequest, session_len: int, held: str) -> str:
    """Return the reason for the context; ``held`` ends it: "fits" ends "lowered to what fits"."""
    longest = request.model.text.max_position_embeddings
    if "session_len" in request.engine_options:
        return "as set by you"
    if request.promise is not None:
        return "as promised"
    if request.workload.context is not None:
        return "the context asked for"
    if request.least:
        return "the workload's request; --context asks for more"
    if session_len >= longest:
        return f"the model's own context, which {held}"
    return f"the model's {longest} lowered to what {held}"


def _image_limit_line(request: ResolvedRequest, best: Evaluation) -> Iterator[str]:
    """Yield the line that says why the image limit has its value."""
    rule, image_limit = request.model.image_rule, best.shape.image_limit
    if rule is None or not rule.varies_by_limit:
        return
    why = f"the largest that can be served; the model's own is {request.requested_image_limit}"
    if request.image_limit is not None:
        why = "as set by you" if request.promise is None else "as promised"
    elif image_limit == request.requested_image_limit:
        why, more = "the model's own", rule.exposed_limit
        if more > rule.checkpoint_limit:
            why += f"; larger images of a client (detail: high is {more}) are lowered to this limit"
    yield f"{rule.limit_name} {image_limit}: {why}"


def unkept(request: ResolvedRequest, promised: int) -> Iterator[str]:
    """Yield a warning if the person gave a context that is longer than the promised one.

    The smallest cache then holds only the ``promised`` tokens.
    """
    asked = most_context(request)
    if request.context_given and asked > promised:
        yield (
            f"the cache holds {promised:,} tokens, a session may have {asked:,}: no"
            " request is served that is longer than the cache"
        )


def beyond_model(request: ResolvedRequest, session_len: int) -> Iterator[str]:
    """Yield a warning if the context is longer than the contexts that the model was trained on."""
    longest = request.model.text.max_position_embeddings
    if session_len > longest:
        yield (
            f"{request.model.name} reads {longest:,} tokens, a session may have {session_len:,}:"
            " LMDeploy accepts longer requests, but the model was not made for them"
        )


def limit_costs(request: ResolvedRequest, best: Evaluation, engine: Engine) -> Iterator[LimitCost]:
    """Yield the cost of the plan's image limit and of the common limits that fit, largest first.

    Each cost is computed for this plan's groups; a plan for another limit might choose other
    groups.
    """
    rule, image_limit = request.model.image_rule, best.shape.image_limit
    sized = request.workload.image_size is not None
    if rule is None or image_limit is None or sized or not best.vision_load.units_per_image:
        return
    if not request.compares_limits:
        return
    if not rule.varies_by_limit or request.least:  # with --least, no limit gives more cache
        return
    gpus = best.gpus(request.machine)
    limits = {
        image_limit,
        *(other for other in rule.common_limits if other <= rule.checkpoint_limit),
    }
    for other in sorted(limits, reverse=True):
        evaluation = best if other == image_limit else at_limit(request, best.shape, other, engine)
        if not evaluation.fits:
            continue
        images, speeds = vision_load_of(request, other), evaluation.speeds
        found = forecast(request, speeds, images, engine=engine.name, gpus=gpus)
        yield LimitCost(
            limit=other,
            option=f"{rule.limit_option} {other}",
            image_tokens=images.tokens_per_request // images.images_per_request,
            kv_tokens=sum(part.kv_tokens for part in evaluation.engines),
            requests_at_once=round(sum(speed.running for speed in speeds)),
            requests_per_second=found.requests_per_second,
            seconds_to_first_token=found.seconds_to_first_token_alone,
        )


def usual_image(fit: EngineFit) -> UsualImage | UnsetType:
    """Forecast the same settings for images of a usual size instead of the largest.

    Returns UNSET if there are no images, if the person gave their size, or if a usual image has as
    many vision units as the largest.
    """
    request, best = fit.request, fit.best
    rule, image_limit, worst = request.model.image_rule, best.shape.image_limit, best.vision_load
    if rule is None or image_limit is None or request.workload.image_size is not None:
        return UNSET
    load = photographs(rule, image_limit, worst)
    if load.units_per_image >= worst.units_per_image:
        return UNSET
    found = forecast(
        request.with_workload(image_size=PHOTOGRAPH),
        fit.speeds_of(load),
        load,
        engine=fit.engine.name,
        gpus=best.gpus(request.machine),
    )
    return UsualImage(
        image_size=PHOTOGRAPH,
        image_tokens=rule.unit_tokens(load.units_per_image),
        requests_at_once=requests_held(fit.accounts, load),
        requests_per_second=found.requests_per_second,
        seconds_to_first_token=found.seconds_to_first_token,
        host=found.host,
        seconds_to_first_token_alone=found.seconds_to_first_token_alone,
    )
