"""The requests that an engine must answer before it counts as ready, and their forecast time.

The worst cases bring its memory to the plan's peak before a client can. If they would take long,
and fewer encodings of one image use the same memory, that cheaper request is sent. A plan that was
proved on its cards answers one small request (`serving.proved`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Protocol

from turbofit.memory.engines import engine_of
from turbofit.planning.speed import GroupRates, group_rates, rates
from turbofit.planning.tower import BEFORE
from turbofit.serving.engine.worst_requests import (
    cheaper_forward,
    fullest_forward,
    longest_request,
    small_requests,
    worst_image_tokens,
    worst_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from turbofit.core.plan import Plan
    from turbofit.serving.engine.worst_requests import ProbeRequest


class Examined(Protocol):
    """An engine that is examined by its plan."""

    @property
    def plan(self) -> Plan:
        """The plan by which it runs."""


#: The check: ``auto`` sends the worst cases if they were not yet answered here, else one small
#: request; ``full`` always sends the worst cases, ``quick`` always the small request.
CheckMode = Literal["auto", "full", "quick", "none"]

#: Seconds of the worst cases, by forecast, above which the cheaper request is sent.
LONG: Final = 20.0
#: Tokens of a chat's prompt around its images, slightly overestimated.
_TEXT: Final = 64


def ask_worst(engine: Examined, model: str, ask: Callable[[ProbeRequest], int]) -> None:
    """Send requests that bring an engine's memory to the plan's peak before a client can.

    ``ask`` sends one and returns the tokens of its prompt, 0 if the engine does not report them.
    """
    plan = engine.plan
    if cheaper_check(plan, model):
        small, rule = small_requests(plan, model)[0], plan.model.image_rule
        text = max(0, ask(small) - (0 if rule is None else rule.tokens(*rule.small_image.size)))
        last = cheaper_forward(plan, model, text)
    else:
        worst = worst_request(plan, model)
        tokens = 0 if worst is None else ask(worst)
        if plan.engine.serial:
            last = longest_request(plan, model, worst, tokens, ask)
        else:
            last = fullest_forward(plan, model, max(0, tokens - worst_image_tokens(plan)))
    if last is not None:
        ask(last)


def ask_small(engine: Examined, model: str, ask: Callable[[ProbeRequest], int]) -> None:
    """Send an engine of a proved plan one small request, with an image if the model takes any."""
    ask(small_requests(engine.plan, model)[0])


def check_seconds(plan: Plan) -> float:
    """The forecast seconds of `ask_worst` for the slowest group; engines are asked concurrently.

    Over, since the engine prepares an image while it encodes another. Measured: 0.8 to 1.3 times
    the forecast on an H100 and an H200.
    """
    groups = plan.group_plans()
    return max(seconds_of(one, cheaper_check(one) or whole_check(one, "")) for one in groups)


def cheaper_check(plan: Plan, model: str = "") -> tuple[ProbeRequest, ...]:
    """The cheaper requests if the worst cases would take long; empty if those are sent."""
    if seconds_of(plan, whole_check(plan, model)) <= LONG:
        return ()
    cheaper = cheaper_forward(plan, model, _TEXT)
    fullest = fullest_forward(plan, model, _TEXT)
    if cheaper is None or fullest is None or fullest.name != cheaper.name:
        return ()
    return small_requests(plan, model)[0], cheaper


def whole_check(plan: Plan, model: str) -> tuple[ProbeRequest, ...]:
    """The worst cases that `ask_worst` sends if they do not take long, with estimated sizes."""
    requests = worst_request(plan, model), fullest_forward(plan, model, _TEXT)
    return tuple(filter(None, requests))


def seconds_of(plan: Plan, questions: Iterable[ProbeRequest]) -> float:
    """Seconds that one engine needs to answer these requests, one after another."""
    engine = engine_of(plan)
    gpus = [plan.machine.gpu(gpu.index) for gpu in plan.gpus][: plan.settings.tp]
    group = group_rates(plan.model, plan.settings, plan.machine, gpus, engine)
    questions = list(questions)
    forward = engine.forward_tokens(plan.settings)
    seconds = sum(_request_seconds(plan, group, forward, question) for question in questions)
    compiled = plan.engine.on_torch and any(question.units for question in questions)
    return seconds + (rates().kernel_seconds if compiled else 0.0)


def _request_seconds(plan: Plan, group: GroupRates, forward: int, question: ProbeRequest) -> float:
    figures, rule, tower = rates(), plan.model.image_rule, group.work.tower
    place, seconds = BEFORE, 0.0
    for units in question.units:
        assert rule is not None
        tokens = rule.unit_tokens(units)
        seconds += tower.encodings(place, tokens, forward) * group.tower_seconds(units)
        seconds += units * rule.unit_side**2 * figures.pixel_seconds
        place += tokens
    prompt = (place - BEFORE + question.tokens) * question.rows
    prefill = group.seconds(figures, prompt, pairs=prompt**2 / 2 / question.rows)
    step = group.seconds(figures, question.rows, cached=prompt)
    return seconds + prefill + question.answer * step
