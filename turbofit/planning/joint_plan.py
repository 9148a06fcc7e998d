"""Several models on the same cards: a part of each card for each of them, and a plan in it.

Each plan pays for its own worst case under its part as a budget, and the parts add up to no more
than a card has: so all promises hold at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, NamedTuple

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.core.messages import plural
from turbofit.core.plan import HostMemory, Plan, ServeCommand
from turbofit.core.struct import NA, JsonDocument, Struct, const, known
from turbofit.core.units import bisect, format_bytes
from turbofit.machine.source import machine_from
from turbofit.planning.commands import joint_serve_command
from turbofit.planning.plan import fits
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.resolve import model_of
from turbofit.tuner.resolved_request import budget_on, host_problem
from turbofit.tuner.verdict import JointVerdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.core.json_types import Options
    from turbofit.core.machine import Gpu
    from turbofit.core.plan import GpuLedger
    from turbofit.planning.request import PlanRequest

JOINT_SCHEMA: Final = "turbofit.joint/1"

#: Halvings of the search for a division, which costs no plan.
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


class JointPlan(JsonDocument):
    """Plans that hold together; ``budgets`` are what each model may take of each GPU.

    ``serve`` serves them; None where they do not fit, or are asked for different things.
    """

    what: ClassVar[str] = "joint plan"

    fits: bool
    verdict: str
    budgets: tuple[int, ...]
    gpus: tuple[JointGpu, ...]
    plans: tuple[Plan, ...]
    remedy: str | None = None
    serve: ServeCommand | None = None
    schema: Annotated[str, const(JOINT_SCHEMA)] = JOINT_SCHEMA


class _Part(NamedTuple):
    """A part of each GPU in bytes, and the plan of one model in it."""

    budget: int
    plan: Plan

    @property
    def beside_cache(self) -> int:
        return self.budget - self.plan.kv.tokens * self.plan.kv.bytes_per_token


@dataclass
class _Candidate:
    """A model that is to have a part: its request on the machine of all, and its plan there."""

    request: PlanRequest
    best: Plan
    pretend: bool | None

    @property
    def longest(self) -> int:
        """Tokens of the longest request that the model takes where it has the whole machine."""
        return max(1, self.best.kv.longest_request_tokens)

    @property
    def request_bytes(self) -> int:
        """What that request takes of a GPU's cache."""
        return max(1, self.longest * self.best.kv.bytes_per_token)

    def within(self, budget: int, *, whole: bool = False) -> Plan:
        """Its plan in a part of so many bytes of each GPU; ``whole``: with other image limits."""
        request = self.request.changed(budget=budget)
        return best_plan(request, pretend=self.pretend, compares_limits=whole)

    def least(self, room: int) -> _Part:
        """The smallest part in which it keeps what was given, to 1/128 of the room. Over."""

        def too_small(budget: int) -> bool:
            return not fits(self.request.changed(budget=budget))

        _, budget = bisect(too_small, 0, room, room // 128 + 1)
        return _Part(budget, self.within(budget))


def joint_plan(requests: Sequence[PlanRequest], *, pretend: bool | None = None) -> JointPlan:
    """Plans of several models that hold on the same cards at the same time.

    First each model's least need for what was given (image limit, context, one request or its
    concurrency); the rest so that the caches hold equal numbers of the longest requests.

    Under: a part is the same of every GPU, as large as the GPU with the least room allows. Where
    they fit on the roomier cards alone, the remedy names these. ``pretend`` is as for `plan`.

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
    joint = _on(machine, requests, pretend)
    if joint.fits:
        return replace(joint, serve=joint_serve_command(joint.plans, requests))
    for cards in _roomier(machine) if joint.gpus else ():
        there = replace(machine, visible=cards)
        if min(_rooms(there, requests[0].budget)) < sum(joint.budgets):
            continue  # fewer cards need no less of each, and another look takes seconds
        try:
            fewer = _on(there, requests, pretend)
        except UsageError:  # such as --tp with more GPUs than these
            continue
        if fewer.fits:
            chosen = ",".join(map(str, cards))
            return replace(joint, remedy=f"--gpus {chosen}: {fewer.verdict}")
    return joint


def _on(machine: Machine, requests: Sequence[PlanRequest], pretend: bool | None) -> JointPlan:
    """The plans on all the visible cards of a machine."""
    # Each model with the whole of the cards: what does not fit so fits with no part.
    models: list[_Candidate] = []
    for model in _candidates(machine, requests, pretend):
        if not model.best.fits:
            return _misfit(model.best)
        models.append(model)
    # The least part in which each keeps what was given.
    rooms = _rooms(machine, requests[0].budget)
    room, parts = min(rooms), _least_parts(models, rooms)
    # The rest of the room for their caches.
    short = sum(part.budget for part in parts) - room
    if short <= 0:
        parts = _divided(models, parts, room)
    pairs = zip(models, parts, strict=True)
    plans = [model.within(part.budget, whole=True) for model, part in pairs]
    gpus = [machine.gpu(index) for index in sorted(machine.visible)]
    accounts = tuple(_gpu(gpu, plans) for gpu in gpus)
    if short > 0:
        verdict = JointVerdict(why_not=_why_short(gpus, parts, room))
    else:
        host = _host_of_all(machine, plans)
        verdict = JointVerdict(found=_found(accounts, plans), why_not=host_problem(host) or "")
    return JointPlan(
        fits=verdict.fits, verdict=verdict.text, budgets=tuple(part.budget for part in parts),
        gpus=accounts, plans=tuple(plans), remedy=None if verdict.fits else _remedy(requests[0]),
    )  # fmt: skip


def _candidates(
    machine: Machine, requests: Sequence[PlanRequest], pretend: bool | None
) -> Iterator[_Candidate]:
    """Each model by itself on the machine, with its part of the host."""
    part = _part_of_host(machine, len(requests))
    for request in requests:
        here = request.changed(on=part, gpus=None)
        best = best_plan(here, pretend=pretend, compares_limits=False)
        # Another engine would promise another thing, and torch gives others nothing back.
        yield _Candidate(here.changed(engine=best.engine.name), best, pretend)


def _least_parts(models: Sequence[_Candidate], rooms: Sequence[int]) -> list[_Part]:
    """The least part of each model, of every GPU the same."""
    parts = [model.least(min(rooms)) for model in models]
    if all(part.plan.fits for part in parts):
        return parts
    # What a card with less room leaves is no need: it is found where there is the most.
    return [model.least(max(rooms)) for model in models]


def _misfit(best: Plan) -> JointPlan:
    """The answer where one model does not fit with the whole machine."""
    helps = next((remedy.text for remedy in best.remedies), None)
    return JointPlan(
        fits=False, verdict=best.verdict, budgets=(), gpus=(), plans=(best,), remedy=helps
    )


def _part_of_host(machine: Machine, models: int) -> Machine:
    """The machine with one model's share of the host's cores: all prepare images on them at once.

    Under: while another model has no images, its cores are free.
    """
    cores = machine.host.cpus
    if cores == NA:
        return machine
    return replace(machine, host=replace(machine.host, cpus=max(1, cores // models)))


def _host_of_all(machine: Machine, plans: Sequence[Plan]) -> HostMemory:
    """Host memory of all models together, beside what the host has."""
    available = machine.host.ram_available
    return HostMemory(
        pinned=sum(plan.host.pinned for plan in plans),
        pageable=sum(plan.host.pageable for plan in plans),
        available=None if available == NA else available,
    )


def _found(accounts: Sequence[JointGpu], plans: Sequence[Plan]) -> str:
    left = format_bytes(min(gpu.left for gpu in accounts))
    return f"{'; '.join(map(_promise, plans))}; {left} of {_each(accounts)} stay free"


def _why_short(gpus: Sequence[Gpu], parts: Sequence[_Part], room: int) -> str:
    needs = ", ".join(f"{part.plan.model.name} {format_bytes(part.budget)}" for part in parts)
    tightest, roomiest = min(gpus, key=_free), max(gpus, key=_free)
    where = "" if _free(tightest) == _free(roomiest) else f" on GPU {tightest.index}"
    short = sum(part.budget for part in parts) - room
    return (
        f"they need {needs} of {_each(gpus)} at least, and {format_bytes(room)} are free{where}:"
        f" {format_bytes(short)} short"
    )


def _each(gpus: Sequence[object]) -> str:
    return "each GPU" if len(gpus) > 1 else "the GPU"


def _remedy(request: PlanRequest) -> str:
    concurrency = " --concurrency," if request.concurrency else ""
    return (
        "turbofit serve --swap lets them take turns; or promise less with"
        f"{concurrency} --context, --images or --quant-policy 8"
    )


def _roomier(machine: Machine) -> list[tuple[int, ...]]:
    """The visible cards without those of the least room, again and again; most cards first."""
    free = {index: _free(machine.gpu(index)) for index in machine.visible}
    sizes = sorted(set(free.values()))[:-1]
    return [tuple(index for index, size in free.items() if size > least) for least in sizes]


def options_of_each(request: PlanRequest, models: Sequence[Options]) -> list[Options]:
    """What is asked of each model beside the request of all: no images of one that takes none.

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
    return [min(_free(gpu), budget_on(gpu, budget)) for gpu in gpus]


def _free(gpu: Gpu) -> int:
    return known(gpu.free, 0)


def _divided(models: Sequence[_Candidate], least: list[_Part], room: int) -> list[_Part]:
    """Parts of the room in which the caches hold as equal numbers of requests as is found.

    What a model takes beside its cache grows with its part, so that a division is corrected by what
    its plans take.
    """
    parts = least
    for _ in range(_ROUNDS):
        budgets = _level(models, parts, least, room)
        tried = [
            _Part(budget, model.within(budget))
            for model, budget in zip(models, budgets, strict=True)
        ]
        fit = all(part.plan.fits for part in tried)
        if fit and _fewest(models, tried) >= _fewest(models, parts):
            parts = tried
    return parts


def _level(
    models: Sequence[_Candidate], parts: Sequence[_Part], least: Sequence[_Part], room: int
) -> list[int]:
    """Budgets with which each cache holds the same number of requests, by what parts take."""

    def at(level: float) -> list[int]:
        return [
            max(smallest.budget, part.beside_cache + int(level * model.request_bytes))
            for model, part, smallest in zip(models, parts, least, strict=True)
        ]

    low, high = 0.0, 1.0
    while sum(at(high)) <= room:
        high *= 2
    for _ in range(_DIVISIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= room else (low, middle)
    return at(low)


def _fewest(models: Sequence[_Candidate], parts: Sequence[_Part]) -> float:
    """The longest requests that the poorest cache holds."""
    return min(
        part.plan.kv.tokens / model.longest for model, part in zip(models, parts, strict=True)
    )


def _promise(plan: Plan) -> str:
    """How many of its longest requests a model's cache holds, in words."""
    longest = plan.kv.longest_request_tokens
    count = plan.kv.total_tokens // longest
    text = f"{plan.model.name} {count} {plural(count, 'request')} of {longest:,} tokens"
    if plan.held is UNSET:
        return text
    return f"{text}, or {plan.held.requests:,} of {plan.held.request_tokens:,} at once"


def _gpu(gpu: Gpu, plans: Sequence[Plan]) -> JointGpu:
    """One GPU's account over all models: what each takes at its worst, beside what it had."""
    total, reserved, used = (known(size, 0) for size in (gpu.total, gpu.reserved, gpu.used))
    models = tuple(
        _on_gpu(plan.model.name, ledger, used)
        for plan in plans
        for ledger in plan.gpus
        if ledger.index == gpu.index
    )
    taken = used + sum(model.bytes for model in models)
    return JointGpu(
        index=gpu.index, name=gpu.name, total=total, reserved=reserved, used=used,
        models=models, left=total - reserved - taken,
    )  # fmt: skip


def _on_gpu(model: str, ledger: GpuLedger, used: int) -> ModelOnGpu:
    """A budget withholds memory as a margin does, which is no part of what this model takes."""
    phases = {
        phase: sum(term.bytes for term in ledger.ledger if term.phase == phase)
        for phase in ("context", "weights", "cache")
    }
    return ModelOnGpu(
        model=model,
        **phases,
        buffers=ledger.steady - used - sum(phases.values()),
        transient=ledger.most - ledger.steady,
        margin=ledger.margin - ledger.beyond_budget,
    )
