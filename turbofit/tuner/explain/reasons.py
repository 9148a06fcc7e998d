"""Why a plan's settings are what they are, a line each, beginning with the setting's name."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.messages import indices, plural
from turbofit.core.units import format_bytes, three_digits
from turbofit.memory.account import RATIO_STEPS, Account
from turbofit.memory.calibrated import calibration_reason
from turbofit.memory.engine import Engine
from turbofit.tuner.resolved_request import ResolvedRequest, vision_load_of
from turbofit.tuner.search.candidates import Evaluation
from turbofit.tuner.search.constraints import dtype_for
from turbofit.tuner.search.context import excess_tokens, longest_context
from turbofit.tuner.search.search import Found

__all__ = ["reasons"]


def reasons(
    request: ResolvedRequest, found: Found, account: Account, engine: Engine
) -> Iterator[str]:
    """The lines, for the weakest group where each has settings of its own.

    Args:
        request: what was asked.
        found: what the search found.
        account: of the group whose forwards are told.
        engine: the engine generation.
    """
    best, settings = found.best, found.best.settings
    if best.fits:
        yield _ratio(request, best)
    if account.calibration is not None:
        yield calibration_reason(account.calibration)
    yield from _margin(request, account)
    rank = "least memory" if request.least else "best rank"
    prefill = f"{rank} of the sizes tried; {engine.prefill_words(settings)}"
    if _differs(best, "max_prefill_token_num"):
        yield f"max_prefill_token_num: on each card the {rank} of the sizes tried"
    else:
        yield _because(request, "max_prefill_token_num", settings.max_prefill_token_num, prefill)
    yield _batch(request, best)
    yield _context(request, best)
    gpus = [request.machine.gpu(index) for index in best.shape.groups[0]]
    yield _because(request, "dtype", settings.dtype, dtype_for(request.model, gpus)[1])
    if best.parts:
        yield (
            "each engine has the settings that serve most on its own card; images and context are"
            " promised once for all of them, as the smallest cache holds them"
        )
    if best.shape.limit is not None and best.vision_load.units_per_image:
        yield from _limit(request, best)
        yield (
            f"the peak pays for {account.units_per_forward:,} vision units in one forward: "
            + (
                "the engine's own bound, so nothing queues"
                if best.shape.units_per_forward is None
                else "less than the engine could bring together, so the gateway must queue"
                + (", as you asked" if request.workload.queue_images else "")
                + (", and the cache gets the rest" if best.queues else "")
            )
        )


def _margin(request: ResolvedRequest, account: Account) -> Iterator[str]:
    """Why less than usual stays free; nothing where it is the usual margin, or a person's."""
    if not request.margin.saved(account.gpus[0]):
        return
    calibration, size = account.calibration, format_bytes(min(account.margins))
    if calibration is not None:
        spread = format_bytes(calibration.spread)
        yield f"margin {size}: 64 MiB, and the {spread} by which what was measured here differed"
    elif request.margin.rehearsed:
        yield (
            f"margin {size}: less than before a rehearsal, which settled what LMDeploy allocates;"
            " contexts and libraries are estimates still (turbofit calibrate measures them)"
        )


def _ratio(request: ResolvedRequest, best: Evaluation) -> str:
    name, ratio = "cache_max_entry_count", best.settings.cache_max_entry_count
    if _differs(best, name):
        size = (
            "smallest that holds the promise" if request.least else "largest that leaves the margin"
        )
        return f"{name}: on each card the {size}"
    if request.least:
        batch, context = best.settings.max_batch_size, best.settings.session_len
        need = f"{batch:,} {plural(batch, 'request')} of {context:,} tokens"
        held = best.kv_tokens >= batch * context
        why = f"the smallest that holds {need}" if held else f"the largest that fits; {need} do not"
        return _because(request, name, f"{ratio:.3f}", why)
    why = f"the largest that leaves the margin; {ratio + 1 / RATIO_STEPS:.3f} does not"
    if request.ratio_caps and ratio >= min(request.ratio_caps.values()):
        why = "lowered by what a rehearsal saw"
    return _because(request, name, f"{ratio:.3f}", why)


def _batch(request: ResolvedRequest, best: Evaluation) -> str:
    name, requests = "max_batch_size", request.workload.concurrency
    if requests is None:
        return _chosen_batch(request, best)
    if not best.parts:
        replicas = best.shape.replicas
        why = f"{requests} concurrent {plural(requests, 'request')}"
        if best.held and not best.fits:
            why = f"the most that the cache holds of {why}"
        why += f" over {replicas} {plural(replicas, 'replica')}"
        return _because(request, name, best.settings.max_batch_size, why)
    shares = ", ".join(
        f"{three_digits(part.shape.requests(requests))} on GPU {indices(group)}"
        for part in best.parts
        for group in part.shape.groups
    )
    why = f"{requests} concurrent requests are shared: {shares}"
    if _differs(best, name):
        return f"{name}: {why}"
    return _because(request, name, best.settings.max_batch_size, why)


def _chosen_batch(request: ResolvedRequest, best: Evaluation) -> str:
    """Why so many run at once where nobody said how many."""
    name = "max_batch_size"
    if request.least:
        return _because(request, name, best.settings.max_batch_size, "the least that serves")
    why = "the fewest that give 99% of the most requests a second by the forecast"
    if request.workload.goal == "context":
        why += ", and cost at most 1% of the KV tokens"
    if _differs(best, name):
        each = ", ".join(
            f"{part.settings.max_batch_size} on GPU {indices(group)}"
            for part in best.parts
            for group in part.shape.groups
        )
        return f"{name}: {each}: {why}"
    return _because(request, name, best.settings.max_batch_size, why)


def _context(request: ResolvedRequest, best: Evaluation) -> str:
    settings, longest = best.settings, request.model.text.max_position_embeddings
    if request.workload.context is not None:
        why = "the context asked for"
    elif request.least:
        why = "the workload's request; --context asks for more"
    elif settings.session_len == longest_context(request) < longest:
        why = f"enough for most requests; the model reads {longest}: --context asks for more, and"
        why += " takes cache where more images can meet in a forward"
    elif settings.session_len >= longest:
        why = "the model's own context, which the cache holds"
    else:
        why = f"the model's {longest} lowered to what the cache holds"
        if best.parts:
            why = f"the model's {longest} lowered to what the smallest cache holds; --context asks"
            why += " for more, without the cards that cannot hold it"
    return _because(request, "session_len", settings.session_len, why)


def _because(request: ResolvedRequest, name: str, value: object, why: str) -> str:
    return f"{name} {value}: {'as set by you' if name in request.fixed else why}"


def _differs(best: Evaluation, name: str) -> bool:
    """Whether groups have values of their own."""
    return len({getattr(part.settings, name) for part in best.parts}) > 1


def _limit(request: ResolvedRequest, best: Evaluation) -> Iterator[str]:
    """Why images are held to this limit; nothing of models whose images have none."""
    rule = request.model.image_rule
    assert rule is not None
    name, limit = rule.limit_name, best.shape.limit
    if not rule.varies_by_limit:
        return
    if request.fixed_limit is not None:
        yield f"{name} {limit}: as set by you"
        return
    if limit == request.requested_limit:
        more = rule.exposed_limit
        lowered = (
            f"; images for which a client asks more (detail: high is {more}) are lowered to it"
        )
        yield f"{name} {limit}: the model's own{lowered if more > rule.checkpoint_limit else ''}"
        return
    why = "the largest that can be served"
    requested_load = vision_load_of(request, request.requested_limit)
    if excess_tokens(request, requested_load):
        count = request.workload.images
        images = "an image fits" if count == 1 else f"{count} images fit"
        why = f"the largest with which {images} the context: at the model's own limit they"
        why += f" take {requested_load.tokens_per_request:,} tokens"
    yield f"{name} {limit}: {why}; the model's own is {request.requested_limit}"
