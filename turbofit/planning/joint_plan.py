"""Plans several models on the same cards: each gets a part of each card, and a plan in it.

Each plan contains its own worst case within its part as a budget, and the parts together are at
most the card's memory, so all promises hold at once.
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

#: Steps of the bisection for a division; they need no plan.
_DIVISIONS: Final = 60
#: Divisions that are planned; each is corrected by the results of the one before.
_ROUNDS: Final = 3
_NO_IMAGES: Final[Options] = {"images": 0, "image_size": None}


class ModelOnGpu(Struct):
    """One model's part of a GPU in bytes: its worst case by phase, and its margin."""

    model: str
    context: int
    weights: int
    cache: int
    buffers: int
    transient: int
    margin: int

    @property
    def bytes(self) -> int:
        """The bytes of all phases, with the margin."""
        phases = (self.context, self.weights, self.cache, self.buffers, self.transient)
        return sum(phases) + self.margin


class JointGpu(Struct):
    """One GPU; ``left`` is the memory that stays free if all models are at their worst."""

    index: int
    name: str
    total: int
    reserved: int
    used: int
    models: tuple[ModelOnGpu, ...]
    left: int


class JointPlan(JsonDocument):
    """Plans that hold at the same time; ``budgets`` are the bytes for each model on each GPU.

    ``serve`` is their command; None if they do not fit, or if their options differ.
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
    """A part of each GPU in bytes, and the plan of one model within it."""

    budget: int
    plan: Plan

    @property
    def beside_cache(self) -> int:
        return self.budget - self.plan.kv.tokens * self.plan.kv.bytes_per_token


@dataclass
class _Candidate:
    """A model to place: its request on the machine of all models, and its plan there alone."""

    request: PlanRequest
    best: Plan
    pretend: bool | None

    @property
    def longest(self) -> int:
        """The tokens of the model's longest request if it has the whole machine."""
        return max(1, self.best.kv.longest_request_tokens)

    @property
    def request_bytes(self) -> int:
        """The bytes of the model's longest request in the cache of one GPU."""
        return max(1, self.longest * self.best.kv.bytes_per_token)

    def within(self, budget: int, *, whole: bool = False) -> Plan:
        """The model's plan within so many bytes of each GPU; ``whole``: with other image limits."""
        request = self.request.changed(budget=budget)
        return best_plan(request, pretend=self.pretend, compares_limits=whole)

    def least(self, room: int) -> _Part:
        """The smallest part for the model's given options, rounded up to 1/128 of the room."""

        def too_small(budget: int) -> bool:
            return not fits(self.request.changed(budget=budget))

        _, budget = bisect(too_small, 0, room, room // 128 + 1)
        return _Part(budget, self.within(budget))


def joint_plan(requests: Sequence[PlanRequest], *, pretend: bool | None = None) -> JointPlan:
    """Plan several models that hold on the same cards at the same time.

    First, each model gets the least part for its given options (image limit, context, one request
    or its concurrency); the rest is divided so that all caches hold equal numbers of the longest
    requests.

    All parts of a model are equal, limited by the GPU with the least room, so they may be too
    small. If the models fit only on the roomier cards, the remedy names these. ``pretend`` is as
    for `plan`.

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
            continue  # fewer cards need no less of each, and another attempt takes seconds
        try:
            fewer = _on(there, requests, pretend)
        except UsageError:  # such as --tp with more GPUs than these
            continue
        if fewer.fits:
            chosen = ",".join(map(str, cards))
            return replace(joint, remedy=f"--gpus {chosen}: {fewer.verdict}")
    return joint


def _on(machine: Machine, requests: Sequence[PlanRequest], pretend: bool | None) -> JointPlan:
    """The joint plan on all visible cards of a machine."""
    # Each model alone on all cards: a model that does not fit so fits in no part.
    models: list[_Candidate] = []
    for model in _candidates(machine, requests, pretend):
        if not model.best.fits:
            return _misfit(model.best)
        models.append(model)
    # The least part with which each model keeps its given options.
    rooms = _rooms(machine, requests[0].budget)
    room, parts = min(rooms), _least_parts(models, rooms)
    # The caches share the rest of the room.
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
    """Yield each model, planned alone on the machine with its part of the host."""
    part = _part_of_host(machine, len(requests))
    for request in requests:
        here = request.changed(on=part, gpus=None)
        best = best_plan(here, pretend=pretend, compares_limits=False)
        # Another engine would promise other things, and torch does not return memory to others.
        yield _Candidate(here.changed(engine=best.engine.name), best, pretend)


def _least_parts(models: Sequence[_Candidate], rooms: Sequence[int]) -> list[_Part]:
    """The least part of each model, equal on all GPUs."""
    parts = [model.least(min(rooms)) for model in models]
    if all(part.plan.fits for part in parts):
        return parts
    # The room of the smallest card would hide the need, so the largest room is used.
    return [model.least(max(rooms)) for model in models]


def _misfit(best: Plan) -> JointPlan:
    """The answer if one model does not even fit on the whole machine."""
    helps = next((remedy.text for remedy in best.remedies), None)
    return JointPlan(
        fits=False, verdict=best.verdict, budgets=(), gpus=(), plans=(best,), remedy=helps
    )


def _part_of_host(machine: Machine, models: int) -> Machine:
    """The machine with one model's share of the host's cores: all models prepare images.

    The share is too small while another model has no images.
    """
    cores = machine.host.cpus
    if cores == NA:
        return machine
    return replace(machine, host=replace(machine.host, cpus=max(1, cores // models)))


def _host_of_all(machine: Machine, plans: Sequence[Plan]) -> HostMemory:
    """The host memory of all models together, and the host's available memory."""
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
    """The visible cards without those of least room, repeatedly; the most cards come first."""
    free = {index: _free(machine.gpu(index)) for index in machine.visible}
    sizes = sorted(set(free.values()))[:-1]
    return [tuple(index for index, size in free.items() if size > least) for least in sizes]


def options_of_each(request: PlanRequest, models: Sequence[Options]) -> list[Options]:
    """The options of each model in addition to the common ones; a text model gets no images.

    Raises:
        UsageError: a model is unknown.
        PackageError: a package that reads a model is missing.
    """
    text_only = [model_of(request.changed(**options)).image_rule is None for options in models]
    return [
        {**_NO_IMAGES, **options} if only else options
        for only, options in zip(text_only, models, strict=True)
    ]


def _rooms(machine: Machine, budget: int | str | None) -> list[int]:
    """The bytes of each visible GPU that all models together may use."""
    gpus = [machine.gpu(index) for index in machine.visible]
    return [min(_free(gpu), budget_on(gpu, budget)) for gpu in gpus]


def _free(gpu: Gpu) -> int:
    return known(gpu.free, 0)


def _divided(models: Sequence[_Candidate], least: list[_Part], room: int) -> list[_Part]:
    """Divide the room so that the caches hold numbers of requests as equal as possible.

    A model's memory besides its cache grows with its part, so each division is corrected by the
    results of its plans.
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
    """Budgets with which all caches hold equal numbers of requests, estimated from ``parts``."""

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
    """The number of longest requests in the cache that holds the fewest."""
    return min(
        part.plan.kv.tokens / model.longest for model, part in zip(models, parts, strict=True)
    )


def _promise(plan: Plan) -> str:
    """The number of longest requests that a model's cache holds, in words."""
    longest = plan.kv.longest_request_tokens
    count = plan.kv.total_tokens // longest
    text = f"{plan.model.name} {count} {plural(count, 'request')} of {longest:,} tokens"
    if plan.held is UNSET:
        return text
    return f"{text}, or {plan.held.requests:,} of {plan.held.request_tokens:,} at once"


def _gpu(gpu: Gpu, plans: Sequence[Plan]) -> JointGpu:
    """The account of one GPU over all models: the worst case of each, and earlier use."""
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
    """One model's part; memory that a budget withholds is not part of it."""
    phases = {phase: ledger.bytes_in(phase) for phase in ("context", "weights", "cache")}
    return ModelOnGpu(
        model=model,
        **phases,
        buffers=ledger.steady - used - sum(phases.values()),
        transient=ledger.most - ledger.steady,
        margin=ledger.margin - ledger.beyond_budget,
    )
