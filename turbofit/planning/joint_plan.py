"""Several models on the same cards: a part of each card for each of them, and a plan in it.

Every plan pays for its own worst case, and the parts add up to no more than a card has: so all
promises hold at once, in the worst case of all at the same moment. Nothing here knows what an
engine takes: each plan is the planner's, under a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.core.messages import plural
from turbofit.core.plan import Plan, ServeCommand
from turbofit.core.struct import Struct, const, known, to_json
from turbofit.core.units import format_bytes
from turbofit.machine.source import machine_from
from turbofit.planning.commands import joint_serve_command
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.resolve import model_of
from turbofit.tuner.resolved_request import budget_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from turbofit.core.json_types import Options
    from turbofit.core.machine import Gpu
    from turbofit.planning.request import PlanRequest
    from turbofit.tuner.resolved_request import Margin

JOINT_SCHEMA: Final = "turbofit.joint/1"

#: Halvings of the search for the least that a model needs: to 1/128 of the room.
_HALVINGS: Final = 7
#: The same for a division, which costs no plan.
_DIVISIONS: Final = 60
#: Divisions that are planned; each is corrected by what the last one's plans take.
_ROUNDS: Final = 3
_NO_IMAGES: Final[Options] = {"images": 0, "image_size": None}


class ModelOnGpu(Struct):
    """One model's part of a GPU, in bytes: what its worst case takes, by phase, and its margin."""

    model: str
    context: int
    weights: int
    cache: int
    buffers: int
    transient: int
    margin: int

    @property
    def bytes(self) -> int:
        """All of it, the margin too."""
        phases = (self.context, self.weights, self.cache, self.buffers, self.transient)
        return sum(phases) + self.margin


class JointGpu(Struct):
    """One GPU; ``left`` is what nobody takes when all models are at their worst."""

    index: int
    name: str
    total: int
    reserved: int
    used: int
    models: tuple[ModelOnGpu, ...]
    left: int


class JointPlan(Struct):
    """Plans that hold together; ``budgets`` are what each model may take of each GPU.

    ``serve`` serves them; None where they do not fit, or are asked for different things.
    """

    fits: bool
    verdict: str
    budgets: tuple[int, ...]
    gpus: tuple[JointGpu, ...]
    plans: tuple[Plan, ...]
    remedy: str | None = None
    serve: ServeCommand | None = None
    schema: Annotated[str, const(JOINT_SCHEMA)] = JOINT_SCHEMA

    def to_json(self) -> str:
        """One JSON document."""
        return to_json(self)


@dataclass
class _Candidate:
    """A model that is to have a part: what is asked of it on the machine of all.

    ``best`` is its plan with the whole machine; ``planned`` plans a request.
    """

    request: PlanRequest
    best: Plan
    planned: Callable[[PlanRequest], Plan]

    @property
    def longest(self) -> int:
        """Tokens of its longest request, with the whole machine."""
        return max(1, self.best.kv.longest_request_tokens)

    @property
    def request_bytes(self) -> int:
        """What that request takes of a GPU's cache."""
        return max(1, self.longest * self.best.kv.bytes_per_token)

    def within(self, budget: int) -> Plan:
        """Its plan in a part of so many bytes of each GPU."""
        return self.planned(self.request.changed(budget=budget))

    def least(self, room: int) -> tuple[int, Plan]:
        """The smallest part in which it keeps what was given, to 1/128 of the room. Over."""
        low, high, smallest = 0, room, self.within(room)
        for _ in range(_HALVINGS):
            middle = (low + high) // 2
            plan = self.within(middle)
            if plan.fits:
                high, smallest = middle, plan
            else:
                low = middle
        return high, smallest


def joint_plan(requests: Sequence[PlanRequest], *, pretend: bool | None = None) -> JointPlan:
    """Plans of several models that hold on the same cards at the same time.

    First each model's least need for what was given (image limit, context, one request or its
    concurrency); the rest so that the caches hold equal numbers of the longest requests.

    Under: a part is the same of every GPU, as large as the GPU with the least room allows. Where
    they fit on the roomier cards alone, the remedy names these.

    Args:
        requests: one a model, for the same machine.
        pretend: as for `plan`.

    Raises:
        UsageError: fewer than two models.
        Others as :func:`turbofit.planning.plan.plan`.
    """
    if len(requests) < 2:
        raise UsageError("a joint plan needs two models or more", hint="")
    if any(request.paced for request in requests):
        raise UsageError(
            "a rate and its seconds are for one model", hint="plan each model by itself"
        )
    machine = machine_from(requests[0].on, gpus=requests[0].gpus)

    def planned(request: PlanRequest) -> Plan:
        return best_plan(request, pretend=pretend)

    joint = _on(machine, requests, planned)
    if joint.fits:
        return replace(joint, serve=joint_serve_command(joint.plans, requests))
    for cards in _roomier(machine) if joint.gpus else ():
        there = replace(machine, visible=cards)
        if min(_rooms(there, requests[0].budget)) < sum(joint.budgets):
            continue  # fewer cards need no less of each, and another look takes seconds
        try:
            fewer = _on(there, requests, planned)
        except UsageError:  # such as --tp with more GPUs than these
            continue
        if fewer.fits:
            chosen = ",".join(map(str, cards))
            return replace(joint, remedy=f"--gpus {chosen}: {fewer.verdict}")
    return joint


def _on(
    machine: Machine, requests: Sequence[PlanRequest], planned: Callable[[PlanRequest], Plan]
) -> JointPlan:
    """The plans on all the visible cards of a machine."""
    budget, margins = requests[0].budget, requests[0].margins
    room = min(_rooms(machine, budget), default=0)
    models: list[_Candidate] = []
    for request in requests:
        here = request.changed(on=machine, gpus=None)
        best = planned(here)
        if not best.fits:  # with the whole machine
            helps = next((f"{remedy.change}: {remedy.effect}" for remedy in best.remedies), None)
            return JointPlan(
                fits=False, verdict=best.verdict, budgets=(), gpus=(), plans=(best,), remedy=helps
            )
        # Another engine would promise another thing, and torch gives others nothing back.
        here = here.changed(engine=best.engine.name)
        models.append(_Candidate(here, best, planned))
    needs = [model.least(room) for model in models]
    if not all(plan.fits for _, plan in needs):
        # What a card with less room leaves is no need: it is found where there is the most.
        most = max(_rooms(machine, budget))
        needs = [model.least(most) for model in models]
    least = [need for need, _ in needs]
    if sum(least) > room:
        return _too_much(models, least, [plan for _, plan in needs], room, machine, margins)
    budgets, plans = _divided(models, least, [plan for _, plan in needs], room)
    accounts = _gpus(plans, machine, margins)
    promises, left = "; ".join(map(_promise, plans)), min((gpu.left for gpu in accounts), default=0)
    return JointPlan(
        fits=True,
        verdict=f"fit together: {promises}; {format_bytes(left)} of {_each(accounts)} stay free",
        budgets=tuple(budgets),
        gpus=accounts,
        plans=tuple(plans),
    )


def _roomier(machine: Machine) -> Iterator[tuple[int, ...]]:
    """The visible cards without those of the least room, again and again; most cards first."""
    cards = tuple(machine.visible)
    while cards:
        least = min(_free(machine.gpu(index)) for index in cards)
        cards = tuple(index for index in cards if _free(machine.gpu(index)) > least)
        if cards:
            yield cards


def options_of_each(request: PlanRequest, models: Sequence[Options]) -> list[Options]:
    """What is asked of each model alone: no images of one that takes none.

    Args:
        request: what is asked of all.
        models: what is asked of each beside it, its name among it.

    Raises:
        UsageError: there is no model of a name.
        PackageError: a package that reads it is missing.
    """
    text_only = [model_of(request.changed(**options)).image_rule is None for options in models]
    return [
        {**_NO_IMAGES, **options} if only else options
        for only, options in zip(text_only, models, strict=True)
    ]


def _rooms(machine: Machine, budget: int | str | None) -> list[int]:
    """Bytes of each visible GPU that the models may have together."""
    gpus = [machine.gpu(index) for index in machine.visible]
    return [
        _free(gpu) if budget is None else min(_free(gpu), budget_on(gpu, budget)) for gpu in gpus
    ]


def _free(gpu: Gpu) -> int:
    return known(gpu.free, 0)


def _divided(
    models: Sequence[_Candidate], least: list[int], plans: list[Plan], room: int
) -> tuple[list[int], list[Plan]]:
    """Parts of the room in which the caches hold as equal numbers of requests as is found.

    What a model takes beside its cache grows with its part, so that a division is corrected by what
    its plans take.
    """
    budgets = least
    for _ in range(_ROUNDS):
        beside = [
            budget - plan.kv.tokens * plan.kv.bytes_per_token
            for budget, plan in zip(budgets, plans, strict=True)
        ]
        tried = _level(models, beside, least, room)
        others = [model.within(budget) for model, budget in zip(models, tried, strict=True)]
        if all(plan.fits for plan in others) and _fewest(models, others) >= _fewest(models, plans):
            budgets, plans = tried, others
    return budgets, plans


def _level(
    models: Sequence[_Candidate], beside: Sequence[int], least: Sequence[int], room: int
) -> list[int]:
    """Parts with which each cache holds the same number of requests.

    Args:
        models: whose parts they are.
        beside: what each takes beside its cache.
        least: the smallest parts.
        room: what they may have together.
    """

    def at(level: float) -> list[int]:
        return [
            max(smallest, fixed + int(level * model.request_bytes))
            for model, fixed, smallest in zip(models, beside, least, strict=True)
        ]

    low, high = 0.0, 1.0
    while sum(at(high)) <= room:
        high *= 2
    for _ in range(_DIVISIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= room else (low, middle)
    return at(low)


def _fewest(models: Sequence[_Candidate], plans: Sequence[Plan]) -> float:
    """The longest requests that the poorest cache holds."""
    return min(plan.kv.tokens / model.longest for model, plan in zip(models, plans, strict=True))


def _promise(plan: Plan) -> str:
    """How many of its longest requests a model's cache holds, in words."""
    longest = plan.kv.longest_request_tokens
    count = plan.kv.total_tokens // longest
    text = f"{plan.model.name} {count} {plural(count, 'request')} of {longest:,} tokens"
    if plan.held is UNSET:
        return text
    return f"{text}, or {plan.held.requests:,} of {plan.held.request_tokens:,} at once"


def _gpus(plans: Sequence[Plan], machine: Machine, margin: Margin) -> tuple[JointGpu, ...]:
    """The account of each GPU that may be used."""
    return tuple(_gpu(machine.gpu(index), plans, margin) for index in sorted(machine.visible))


def _gpu(gpu: Gpu, plans: Sequence[Plan], margin: Margin) -> JointGpu:
    """One GPU's account over all models: what each takes at its worst, beside what it had.

    A budget withholds memory as a margin does; ``margin`` is what each must leave without that.
    """
    total, reserved, used = (known(size, 0) for size in (gpu.total, gpu.reserved, gpu.used))
    models = []
    for plan in plans:
        for ledger in plan.gpus:
            if ledger.index != gpu.index:
                continue
            phases = dict.fromkeys(("context", "weights", "cache"), 0)
            for term in ledger.ledger:
                if term.phase in phases:
                    phases[term.phase] += term.bytes
            before = used + sum(phases.values())
            models.append(
                ModelOnGpu(
                    model=plan.model.name,
                    **phases,
                    buffers=ledger.steady - before,
                    transient=ledger.most - ledger.steady,
                    margin=min(ledger.margin, margin.of(gpu)),
                )
            )
    taken = used + sum(model.bytes for model in models)
    return JointGpu(
        index=gpu.index, name=gpu.name, total=total, reserved=reserved, used=used,
        models=tuple(models), left=total - reserved - taken,
    )  # fmt: skip


def _too_much(
    models: Sequence[_Candidate],
    least: Sequence[int],
    plans: Sequence[Plan],
    room: int,
    machine: Machine,
    margin: Margin,
) -> JointPlan:
    """Each fits alone, and all together do not."""
    needs = ", ".join(
        f"{model.best.model.name} {format_bytes(need)}"
        for model, need in zip(models, least, strict=True)
    )
    short, gpus = sum(least) - room, _gpus(plans, machine, margin)
    free = [_free(machine.gpu(index)) for index in machine.visible]
    tightest = machine.visible[free.index(min(free))]
    where = "are free" if min(free) == max(free) else f"are free on GPU {tightest}"
    return JointPlan(
        fits=False,
        verdict=f"do not fit together: they need {needs} of {_each(gpus)} at least, and "
        f"{format_bytes(room)} {where}: {format_bytes(short)} short",
        budgets=tuple(least),
        gpus=gpus,
        plans=tuple(plans),
        remedy="turbofit serve --swap lets them take turns; or promise less with"
        f"{' --concurrency,' if models[0].request.concurrency else ''} --context, --images or"
        " --quant-policy 8",
    )


def _each(gpus: Sequence[object]) -> str:
    return "each GPU" if len(gpus) > 1 else "the GPU"
