"""The forecast of a trace under plans: the document of `turbofit predict --trace`.

The gateway's own rules say what it refuses or lowers; `tuner.trace` simulates the rest.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from functools import cache
from math import isnan
from typing import TYPE_CHECKING, Annotated, Final

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct, const, doc
from turbofit.core.version import __version__
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_limits import RequestedImage, bounds_of, check_request
from turbofit.gateway.limits.sharing import by_request, hold_images
from turbofit.load.result import Spread, spread
from turbofit.memory.calibrated import identity
from turbofit.memory.engines import engine_of
from turbofit.tuner.speed import group_rates
from turbofit.tuner.trace import SimulatedEngine, TraceRequest, replay

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.core.plan import Plan
    from turbofit.load.trace import TracedRequest

TRACE_SCHEMA: Final = "turbofit.trace/1"
#: The simulation compared with published figures: errors of requests a second (median and 90th
#: percentile), and the smallest and largest ratio of first tokens; tests/bench/test_speed.py.
RATE_ERRORS: Final = (0.064, 0.161)
RATE_FIGURES: Final = 50
FIRST_TOKENS: Final = (0.22, 2.0)
FIRST_FIGURES: Final = 32
_OF_VISION: Final = (
    ", images rest on two cards (docs/accuracy.md#images), and the simulation does not know that "
    "the host prepares them: where it is the limit, rates are too high"
)


class RefusedRequests(Struct):
    """Requests of a trace that the gateway refuses, by its reason."""

    reason: Annotated[str, doc("As refused_total of /metrics; prompt_too_long: the engine's.")]
    count: int


class TracedPlan(Struct):
    """What a trace would meet under one plan. Times are seconds."""

    on: Annotated[str, doc("The machine.")]
    engine: Annotated[str, doc("The engine and its shape, in words.")]
    answered: Annotated[int, doc("Requests.")]
    refused: tuple[RefusedRequests, ...] = ()
    lowered: Annotated[int, doc("Requests whose images or answers the plan makes smaller.")] = 0
    seconds: Annotated[float, doc("From the first arrival to the last answer's end.")] = 0.0
    requests_per_second: float = 0.0
    output_tokens_per_second: float = 0.0
    ttft: Annotated[Spread, doc("To the first token.")] = Spread()
    tpot: Annotated[Spread, doc("A token after the first.")] = Spread()
    e2e: Annotated[Spread, doc("To the end of the answer.")] = Spread()
    queue: Annotated[Spread, doc("Before a prompt is read.")] = Spread()
    most_waiting: Annotated[int, doc("Requests that wait at once, at most, of one engine.")] = 0
    running: Annotated[float, doc("Requests that run, on average over all engines.")] = 0.0
    at_once: Annotated[int, doc("Requests that all engines run at most.")] = 0
    busy: Annotated[float, doc("Share of the time in which an engine computes, on average.")] = 0.0
    cache_used: Annotated[float, doc("Share of the KV cache in use, while engines compute.")] = 0.0
    cache_most: Annotated[float, doc("The largest such share of an engine.")] = 0.0
    evicted: Annotated[int, doc("Times that a full cache had a request begin again.")] = 0


class TraceForecast(Struct):
    """A trace under one plan, or two: a forecast, never a promise."""

    schema: Annotated[str, const(TRACE_SCHEMA)] = TRACE_SCHEMA
    turbofit_version: str
    created: str
    model: str
    trace: Annotated[str, doc("The file.")]
    requests: int
    seconds: Annotated[float, doc("Between the first and the last arrival.")]
    text_tokens: Annotated[float, doc("Of a request on average.")]
    output_tokens: Annotated[float, doc("Of an answer on average.")]
    images: Annotated[float, doc("Of a request on average.")]
    plans: tuple[TracedPlan, ...]
    basis: Annotated[str, doc("What it rests on, and how far off it has been.")]


def trace_forecast(
    plans: Sequence[Plan], trace: Sequence[TracedRequest], file: str
) -> TraceForecast:
    """The forecast of a trace, as `read_trace` returns it, under each of some plans that fit.

    Raises:
        UsageError: a plan is of another model than the first, or its engine answers one request
          after another, which is not simulated.
    """
    model, count = plans[0].model, len(trace)
    for plan in plans[1:]:
        if identity(plan.model) != identity(model):
            raise UsageError(
                f"the other plan is of {plan.model.name}, not of {model.name}",
                hint=f"turbofit plan MODEL --json > FILE saves one of {model.name}",
            )
    median, most = RATE_ERRORS
    vision = "" if model.vision is None else _OF_VISION
    return TraceForecast(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model.name,
        trace=file,
        requests=count,
        seconds=round(trace[-1].at, 3),
        text_tokens=round(sum(line.text_tokens for line in trace) / count, 1),
        output_tokens=round(sum(line.output_tokens for line in trace) / count, 1),
        images=round(sum(len(line.images) for line in trace) / count, 2),
        plans=tuple(_under(plan, trace) for plan in plans),
        basis=(
            f"estimate by the forecast's rates, no GPU: of requests a second the median error is "
            f"{median:.1%}, p90 {most:.1%} over {RATE_FIGURES} published figures of text models; "
            f"first tokens were {FIRST_TOKENS[0]} to {FIRST_TOKENS[1]} times the published ones "
            f"over {FIRST_FIGURES}{vision} (docs/accuracy.md#a-trace); prompts that begin alike "
            f"count whole"
        ),
    )


def _under(plan: Plan, trace: Sequence[TracedRequest]) -> TracedPlan:
    if plan.engine.serial:
        raise UsageError(
            f"{plan.model.name} is planned for Transformers, which answers one request after the "
            "other",
            hint="a trace is forecast for LMDeploy's engines",
        )
    requests, refused, lowered = admitted_requests(plan, trace)
    engines = list(simulated_engines(plan))
    replayed = _Replayed(engines, requests)
    refused["queue_full"] += len(replayed.times.refused)
    times, loads, span = replayed.times, replayed.loads, replayed.span
    return TracedPlan(
        on=plan.machine.name,
        engine=f"{plan.engine.name}, tp {plan.parallel.tp} x {plan.parallel.replicas}",
        answered=len(replayed.answered),
        refused=_by_reason(refused),
        lowered=lowered,
        seconds=round(span, 3),
        requests_per_second=round(len(replayed.answered) / span, 4),
        output_tokens_per_second=round(replayed.tokens / span, 1),
        ttft=replayed.until(times.first),
        tpot=replayed.tpot(),
        e2e=replayed.until(times.ended),
        queue=replayed.until(times.begun),
        most_waiting=max(load.most_waiting for load in loads),
        running=round(sum(load.running_seconds for load in loads) / span, 2),
        at_once=sum(engine.batch for engine in engines),
        busy=round(replayed.busy / span / len(loads), 4),
        cache_used=round(replayed.cache_used, 4),
        cache_most=round(max(load.most_cached / load.engine.kv_tokens for load in loads), 4),
        evicted=sum(load.evicted for load in loads),
    )


class _Replayed:
    """Requests as simulated engines answered them, behind a gateway with its default queue."""

    def __init__(
        self, engines: Sequence[SimulatedEngine], requests: Sequence[TraceRequest]
    ) -> None:
        gateway = GatewayConfig()
        self.requests = requests
        self.times, self.loads = replay(
            engines, requests, queue=gateway.queue_length, patience=gateway.queue_seconds
        )
        ended = self.times.ended
        self.answered = [n for n, moment in enumerate(ended) if not isnan(moment)]
        #: Seconds until the end of the last answer.
        self.span = max((ended[n] for n in self.answered), default=0.0) or 1.0
        self.tokens = sum(requests[n].output for n in self.answered)
        #: Seconds in which engines computed, the sum of all.
        self.busy = sum(load.busy for load in self.loads)

    def until(self, moments: Sequence[float]) -> Spread:
        """Seconds from the arrival of each answered request to its moment."""
        return spread([moments[n] - self.requests[n].at for n in self.answered])

    def tpot(self) -> Spread:
        """Seconds a token after the first; answers of one token are left out."""
        first, ended = self.times.first, self.times.ended
        return spread(
            (ended[n] - first[n]) / (output - 1)
            for n in self.answered
            if (output := self.requests[n].output) > 1
        )

    @property
    def cache_used(self) -> float:
        """The share of the caches in use, averaged over the time in which engines compute."""
        used = sum(load.cached_seconds / load.engine.kv_tokens for load in self.loads)
        return used / (self.busy or 1.0)


def _by_reason(refused: Counter[str]) -> tuple[RefusedRequests, ...]:
    return tuple(
        RefusedRequests(reason=reason, count=number)
        for reason, number in refused.most_common()
        if number
    )


def simulated_engines(plan: Plan) -> Iterator[SimulatedEngine]:
    engine, gate = engine_of(plan), bounds_of(plan).gate
    for number, group in enumerate(plan.group_plans()):
        settings = group.settings
        gpus = [plan.machine.gpu(index) for index in plan.parallel.groups[number]]
        yield SimulatedEngine(
            rates=group_rates(plan.model, settings, plan.machine, gpus, engine),
            batch=settings.max_batch_size,
            kv_tokens=group.kv.tokens,
            chunk=engine.prompt_tokens(settings),
            gate=gate,
            share=plan.by_group[number].at_once if plan.by_group else 1.0,
            context=settings.session_len,
        )


def admitted_requests(
    plan: Plan, trace: Sequence[TracedRequest]
) -> tuple[list[TraceRequest], Counter[str], int]:
    """The requests that the gateway passes on, its refusals by reason, and how many it lowers."""
    bounds, refused, lowered = bounds_of(plan), Counter[str](), 0
    most, together = bounds.longest_request_tokens, by_request(bounds)

    @cache
    def images_of(sizes: tuple[tuple[int, int], ...]) -> tuple[int, int, bool] | Refusal:
        wanted = [RequestedImage(size=size, by_request=together) for size in sizes]
        try:
            limited = hold_images(bounds, wanted).images
            check_request(bounds, limited)
        except Refusal as exc:
            return exc
        units = sum(image.units for image in limited)
        tokens = sum(image.tokens for image in limited)
        free = 0 if bounds.rule is None else sum(bounds.rule.units(*size) for size in sizes)
        return units, tokens, units < free

    requests = []
    for line in trace:
        images = images_of(line.images)
        if isinstance(images, Refusal):
            refused[images.reason] += 1
            continue
        units, tokens, smaller = images
        prompt, output = max(1, line.text_tokens + tokens), max(1, line.output_tokens)
        if prompt >= most:
            refused["prompt_too_long"] += 1
            continue
        answer = min(output, most - prompt)
        lowered += smaller or answer < output
        count = len(line.images)
        requests.append(TraceRequest(line.at, prompt, answer, units, count, tokens))
    return requests, refused, lowered
