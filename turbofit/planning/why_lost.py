"""Why a candidate of a plan lost: the sentence of ``considered[].why_not``.

`_Search.best` in `planning.search.search` takes the candidate with the largest
`Evaluation.search_order` (`planning.search.shapes`); `_best_engine` in `planning.choose` decides
between LMDeploy's two engines, by figures that are the first of the same key.
`why_lost` names the first figure in which a candidate ranks below the chosen one, or what the
candidate lacks to serve.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.units import format_bytes, three_digits
from turbofit.memory.account import Engine, VisionLoad
from turbofit.memory.start_outcome import StartOutcome, outcome_at, outcome_without_cache
from turbofit.planning.resolved_request import ResolvedRequest, accounts_of
from turbofit.planning.search.shapes import Evaluation
from turbofit.planning.search.sizing import SearchState, Sizer, excess_tokens, most_context
from turbofit.planning.speed import Speed, counted_tokens, group_class
from turbofit.planning.throughput import surety_of_speed

#: Links are named as a cause if a step waits for them for more than this share of its time.
_MUCH: Final = 0.1
#: The name of a forecast that ranks shapes, but whose figures are not printed.
_NOT_PRINTED: Final = "a forecast that is not printed"


def why_lost(
    request: ResolvedRequest, chosen: Evaluation, candidate: Evaluation, engine: Engine
) -> str:
    """Return why a candidate is not the plan: it does not serve, or it ranks below ``chosen``."""
    unserved = why_not_served(request, candidate, engine)
    return unserved or why_ranked_lower(request, chosen, candidate)


def why_not_served(request: ResolvedRequest, evaluation: Evaluation, engine: Engine) -> str:
    """Return the reason why a shape does not serve, in words; empty if it serves."""
    if evaluation.fits:
        return ""
    if evaluation.serves:
        return _too_few(request, evaluation)
    if len(evaluation.parts) > 1:
        worst = max(evaluation.parts, key=lambda part: part.short)
        return why_not_served(request, worst, engine)
    sizer = Sizer(SearchState(request, engine), evaluation.shape)
    outcome = _worst_outcome(sizer, evaluation)
    starts = outcome.kind in ("serves", "request", "margin")  # else the lack of memory is named
    if starts and excess_tokens(request, evaluation.vision_load):
        return too_long(request, evaluation.vision_load)
    if outcome.kind != "serves":
        return outcome.text
    return (
        f"the cache holds {evaluation.kv_tokens} tokens, one request needs {sizer.needed_tokens()}"
    )


def _worst_outcome(sizer: Sizer, evaluation: Evaluation) -> StartOutcome:
    """Return the outcome of the start of the group that lacks the most memory."""
    groups = evaluation.shape.groups
    settings = [evaluation.settings] * len(groups)
    accounts = accounts_of(sizer.request, settings, groups, sizer.vision_load, sizer.engine)
    ratio = sizer.ratio(accounts)
    outcomes = [
        outcome_without_cache(account) if ratio is None else outcome_at(account, ratio)
        for account in accounts
    ]
    return max(outcomes, key=lambda outcome: (outcome.kind != "serves", outcome.missing))


def _too_few(request: ResolvedRequest, evaluation: Evaluation) -> str:
    """Say that a shape holds fewer requests at once than are promised, and what limits them."""
    wanted, count = request.promised_requests, evaluation.held_requests
    settings = evaluation.settings
    size = counted_tokens(evaluation.vision_load, settings.session_len)
    if not evaluation.short:
        given = "max_batch_size" in request.engine_options
        most = "" if given else ", the most that LMDeploy survives,"
        batch = settings.max_batch_size
        return f"max_batch_size {batch}{most} runs {count:,} of {wanted:,} at once"
    several = sum(map(len, evaluation.shape.groups)) > 1
    per_gpu = " on each GPU" if several and len(evaluation.parts) < 2 else ""
    return (
        f"the cache holds {count:,} of {wanted:,} requests of {size:,} tokens,"
        f" {format_bytes(evaluation.short)} short{per_gpu}"
    )


def too_long(request: ResolvedRequest, vision_load: VisionLoad) -> str:
    """Say that the images of one request do not fit the longest context."""
    count = vision_load.images_per_request
    images = "one image of the largest size is" if count == 1 else ""
    images = images or f"{count:,} images of the largest size are"
    return (
        f"{images} {vision_load.tokens_per_request:,} tokens, which do not"
        f" fit a context of {most_context(request):,} with text beside them"
    )


def why_ranked_lower(request: ResolvedRequest, chosen: Evaluation, candidate: Evaluation) -> str:
    """Return why a shape that serves ranks below ``chosen``, with the figure that decides."""
    if candidate.worth < chosen.worth:
        figure = _worse_figure(request, chosen, candidate)
        slower = candidate.worth[:-1] == chosen.worth[:-1]
        return figure + (_slow_links(request, chosen, candidate) if slower else "")
    if candidate.queues and not chosen.queues:
        return "image requests would queue"
    if candidate.kv_tokens < chosen.kv_tokens:
        return f"{chosen.kv_tokens - candidate.kv_tokens:,} KV tokens fewer"
    return "equal; a larger prefill and fewer GPUs an engine are preferred"


def _worse_figure(request: ResolvedRequest, chosen: Evaluation, candidate: Evaluation) -> str:
    """Return the first part of `Evaluation.worth` in which a candidate is worse, in words."""
    smaller, larger = candidate.vision_load, chosen.vision_load
    if smaller.units_per_request < larger.units_per_request:
        tokens = smaller.tokens_per_request, larger.tokens_per_request
        figures = ": {:,} tokens a request, not {:,}".format(*tokens)
        return "serves smaller images" + (figures if tokens[0] < tokens[1] else "")
    shorter, context = candidate.settings.session_len, chosen.settings.session_len
    if shorter < context:
        return f"its cache holds a context of {shorter:,} tokens, not {context:,}"
    goal = request.workload.goal
    if candidate.footprint > chosen.footprint:
        return f"takes {format_bytes(candidate.footprint - chosen.footprint)} more"
    if not (speed_is_known(request, chosen) and speed_is_known(request, candidate)):
        return f"slower by {_NOT_PRINTED}"
    if goal == "latency":
        return f"an answer in {1 / candidate.score:.1f} s, not {1 / chosen.score:.1f}"
    if goal == "context":
        return f"{candidate.kv_tokens:,} KV tokens for one request, not {chosen.kv_tokens:,}"
    if candidate.score < chosen.score:
        return f"{three_digits(candidate.score)} requests/s, not {three_digits(chosen.score)}"
    rate, more = three_digits(candidate.ranked), three_digits(chosen.ranked)
    return f"{rate} requests/s of small images, not {more}"


def _slow_links(request: ResolvedRequest, chosen: Evaluation, candidate: Evaluation) -> str:
    """Return a clause that names slow links as the cause of a lower speed, or an empty text."""
    known = speed_is_known(request, chosen) and speed_is_known(request, candidate)
    if not (known and candidate.speeds and chosen.speeds) or request.workload.goal == "context":
        return ""

    def waits(speed: Speed) -> float:
        return speed.reduce / speed.step

    worst, group = max(
        zip(candidate.speeds, candidate.shape.groups, strict=True), key=lambda p: waits(p[0])
    )
    share = waits(worst)
    if share <= max(_MUCH, *map(waits, chosen.speeds)):
        return ""
    links = group_class(request.machine, [request.machine.gpu(index) for index in group])
    return f": {share:.0%} of a step waits for links ({links.words})"


def speed_is_known(request: ResolvedRequest, evaluation: Evaluation) -> bool:
    """Return whether a plan prints the value that ranks a shape: a known speed, or KV tokens."""
    images, gpus = bool(evaluation.vision_load.units_per_image), evaluation.gpus(request.machine)
    sure = surety_of_speed(request.model, evaluation.engine, gpus, images=images)
    return sure.known or request.workload.goal == "context"


def forecast_name(request: ResolvedRequest, evaluation: Evaluation) -> str:
    """Return how reasons name the forecast that ranks a shape, by whether a plan prints it."""
    return "the forecast" if speed_is_known(request, evaluation) else _NOT_PRINTED
