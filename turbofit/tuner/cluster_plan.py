"""The plan of a cluster: every kind of node alone, one promise, and every node under it.

The promise is as large as any kind of node keeps: the image limit first, the asked one where a kind
serves it, then the context. Nodes that do not keep it are left out and cost the others nothing. A
concurrency is held by all that keep the promise together; where they hold less of it, a shorter
context with more nodes is promised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from math import ceil
from sys import maxsize
from typing import Any, Final

from msgspec import UNSET, UnsetType
from msgspec.structs import fields, replace

from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Host, Machine
from turbofit.core.plan import Held, Limits, Plan, Remedy, Throughput
from turbofit.core.struct import NA, Struct, known
from turbofit.core.units import GIB
from turbofit.core.version import REFERENCE, __version__
from turbofit.memory.versions import release
from turbofit.tuner.choose import best_plan
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import evenly, held_shares

_ALMOST: Final = 1e-6
#: Contexts that are tried where all requests must be held, and causes in a verdict.
_MOST_CONTEXTS: Final = 8
_MOST_CAUSES: Final = 3


class Promise(Struct):
    """What clients are told: image limit (tiles or pixels) and context; None: as each node can."""

    limit: int | None = None
    context: int | None = None

    def is_all_of(self, plan: Plan) -> bool:
        """Whether a plan keeps just this."""
        limit, context = plan.limits.image_limit, plan.kv.longest_request_tokens
        return self.limit in (None, limit) and self.context in (None, context)

    def why_broken(self, plan: Plan, unit: str) -> str:
        """How a plan falls short of it; empty where it does not."""
        limit, most = plan.limits.image_limit, plan.kv.longest_request_tokens
        if self.limit is not None and limit is not None and limit < self.limit:
            return f"serves images of {limit:,} {unit} at most, {self.limit:,} are promised"
        if self.context is not None and most < self.context:
            return f"holds {most:,} tokens under the promised images, {self.context:,} are promised"
        return ""


#: What a node can by itself.
_ALONE: Final = Promise()


class _Tried(Struct):
    """A kind's plan, or the error that there is none; ``why_not`` is empty where it serves."""

    plan: Plan | None
    why_not: str = ""

    @property
    def served(self) -> Plan:
        assert self.plan is not None
        return self.plan


class _Choice(Struct):
    """A promise, and the kinds that keep it: a node's share of the requests, and its plan."""

    promise: Promise
    shares: dict[Kind, float]
    plans: dict[Kind, Plan]


class _Planner:
    def __init__(self, base: ResolvedRequest, engine: str) -> None:
        self.base, self.engine = base, engine
        self.requests = base.workload.concurrency
        self.errors: list[TurbofitError] = []
        self._made: dict[tuple[Kind, int | None, Promise], _Tried] = {}
        rule = base.model.image_rule
        self.unit = "" if rule is None else rule.limit_unit

    def plan(self, kind: Kind, share: float, promise: Promise = _ALONE) -> _Tried:
        """One kind with a share of the requests; what it does alone where that is the promise."""
        requests = None if self.requests is None else max(1, ceil(share - _ALMOST))
        key = (kind, requests, promise)
        if key not in self._made:
            tried = None if promise == _ALONE else self.plan(kind, share)
            if tried is None or tried.why_not or not promise.is_all_of(tried.served):
                tried = self._tried(kind.machine, requests, promise)
            self._made[key] = tried
        return self._made[key]

    def _tried(self, machine: Machine, requests: int | None, promise: Promise) -> _Tried:
        base, free = self.base, self.base.limit is None
        workload = replace(base.workload, concurrency=requests)
        if promise.context is not None and not base.context_given:
            workload = replace(workload, context=promise.context)
        request = replace(base, machine=machine, workload=workload)
        if promise.limit is not None and free and base.workload.image_size is None:
            request = replace(request, limit=promise.limit)
        try:
            plan = best_plan(request, self.engine)
        except TurbofitError as error:
            self.errors.append(error)
            return _Tried(plan=None, why_not=error.message)
        why = plan.verdict.removeprefix("does not fit: ").removeprefix(f"{plan.model.name}: ")
        return _Tried(plan=plan, why_not="" if plan.fits else why)

    def shares(self, members: Sequence[Kind], promise: Promise = _ALONE) -> dict[Kind, float]:
        """Requests of one node of each kind: its share, as far as it holds it, or its own batch."""
        if (requests := self.requests) is None:
            plans = {kind: self.plan(kind, 1.0, promise).plan for kind in members}
            return {k: float(plan.requests_at_once) if plan else 1.0 for k, plan in plans.items()}
        sets = [(len(kind.nodes), self._weight(kind)) for kind in members]

        def capacity(place: int, share: float) -> float:
            plan = self.plan(members[place], share, promise).plan
            known = UNSET if plan is None else plan.held
            return share if known is UNSET or not known.requests else float(known.requests)

        shares = held_shares(lambda most: evenly(sets, requests, most), capacity, len(members))
        return dict(zip(members, shares, strict=True))

    def _weight(self, kind: Kind) -> float:
        """What a node of a kind does of all requests, beside others."""
        tried = self.plan(kind, 1.0)
        speed = None if tried.why_not else tried.served.throughput
        return speed.requests_per_second if speed else 0.01 * len(kind.machine.visible)

    def at_once(self, shares: Mapping[Kind, float]) -> float:
        return sum(share * len(kind.nodes) for kind, share in shares.items())

    def holds_all(self, choice: _Choice) -> bool:
        wanted = (self.requests or 0) * (1 - _ALMOST)
        return bool(choice.plans) and self.at_once(choice.shares) >= wanted

    def kept(self, promise: Promise, alone: Mapping[Kind, Plan]) -> _Choice:
        """The kinds that keep a promise together, and what they have then."""
        members = [k for k, plan in alone.items() if not promise.why_broken(plan, self.unit)]
        while members:
            shares = self.shares(members, promise)
            tried = {k: self.plan(k, shares[k], promise) for k in members}
            short = {
                k for k, trial in tried.items()
                if trial.why_not or promise.why_broken(trial.served, self.unit)
            }  # fmt: skip
            if not short:
                plans = {k: trial.served for k, trial in tried.items()}
                return _Choice(promise=promise, shares=shares, plans=plans)
            if len(short) == len(members) and not self.base.context_given:
                # A larger batch leaves a little less cache: what the longest of them still holds.
                free = [self.plan(k, shares[k], Promise(limit=promise.limit)) for k in short]
                held = [trial.served.kv for trial in free if not trial.why_not]
                longest = max((kv.longest_request_tokens for kv in held), default=0)
                if 0 < longest < (promise.context or 0):
                    promise = replace(promise, context=longest)
                    continue
            members = [k for k in members if k not in short]
        return _Choice(promise=promise, shares={}, plans={})

    def choose(self, alone: Mapping[Kind, Plan]) -> _Choice:
        """The best promise that holds all requests, else the one that holds the most of them."""
        limit = max((plan.limits.image_limit or 0 for plan in alone.values()), default=0) or None
        contexts = {
            plan.kv.longest_request_tokens
            for plan in alone.values()
            if plan.limits.image_limit == limit
        }
        if self.base.workload.context is not None:
            contexts = {self.base.workload.context}
        tried = []
        for context in sorted(contexts, reverse=True)[:_MOST_CONTEXTS]:
            tried.append(self.kept(Promise(limit=limit, context=context), alone))
            if self.holds_all(tried[-1]):
                return tried[-1]
        return max(tried, key=lambda choice: self.at_once(choice.shares))


def make_cluster_plan(base: ResolvedRequest, cluster: Cluster, engine: str = "auto") -> ClusterPlan:
    """Plan every node for itself and all under one promise, without the command lines.

    ``tp`` and ``replicas`` are of each node, ``concurrency`` is shared by all; the machine of
    ``base`` is not read.

    Raises:
        TurbofitError: something asked for cannot be used on any node.
    """
    unusable = {node.id: why_unusable(node) for node in cluster.nodes}
    usable = [node for node in cluster.nodes if not unusable[node.id]]
    kinds = kinds_of(usable)
    planner = _Planner(base, engine)
    shares = planner.shares(kinds)
    tried = {kind: planner.plan(kind, share) for kind, share in shares.items()}
    if tried and all(trial.plan is None for trial in tried.values()):
        raise planner.errors[0]
    alone = {k: trial.served for k, trial in tried.items() if not trial.why_not}
    mixed = {k: plan for k, plan in alone.items() if plan.engine.of_lmdeploy} or alone
    choice = planner.choose(mixed) if mixed else None
    kept = choice if choice is not None and planner.holds_all(choice) else None
    kind_of = {node.id: kind for kind in kinds for node in kind.nodes}
    common = _common([plan.limits for plan in kept.plans.values()]) if kept else None
    nodes = []
    for node in cluster.nodes:
        node_plan, kind = _named(node), kind_of.get(node.id)
        if kind is None:
            node_plan = replace(node_plan, why_not=unusable[node.id])
        elif kept and common and kind in kept.plans:
            plan = kind.on(node, _held_to(kept.plans[kind], common, kept.promise))
            first = node is kind.nodes[0]
            plan = replace(plan, limit_costs=(), considered=plan.considered if first else ())
            node_plan = replace(node_plan, plan=plan, at_once=kept.shares[kind])
        else:
            node_plan = replace(node_plan, why_not=_left_out(planner, tried[kind], choice))
        nodes.append(node_plan)
    plans = [node.plan for node in nodes if node.plan is not None]
    longest = min((plan.kv.longest_request_tokens for plan in plans), default=0)
    document = ClusterPlan(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=cluster.source,
        fits=kept is not None,
        verdict="",
        model=base.model,
        workload=replace(base.workload, context=base.workload.context or longest or None),
        limits=common,
        longest_request_tokens=longest,
        total_tokens=sum(plan.kv.total_tokens for plan in plans),
        engines=sum(plan.parallel.replicas for plan in plans),
        nodes=tuple(nodes),
        throughput=_sum([plan.throughput for plan in plans]),
        held=_held(planner, plans, choice),
    )
    return replace(
        document,
        verdict=_verdict(document),
        reasons=tuple(_reasons(planner, common, kept)) if kept and common else (),
        remedies=() if kept else tuple(_remedies(planner, tried, choice)),
        warnings=tuple(_warnings(cluster, document)),
    )


def plan_joining_node(
    base: ResolvedRequest, plan: ClusterPlan, node: Node, engine: str = "auto"
) -> NodePlan:
    """What a node serves under a plan's promise, without the command lines; no other node changes.

    ``base`` is what the plan was asked for; its machine is not read.
    """
    node_plan, why, limits = _named(node), why_unusable(node), plan.limits
    if why or limits is None:
        return replace(node_plan, why_not=why or "nothing is promised: no node served")
    promise = Promise(limit=limits.image_limit, context=plan.longest_request_tokens)
    share, (kind,) = _share(plan, node), kinds_of([node])
    # A node beside the plan is planned for its share; that is no promise: the others hold all.
    workload = replace(plan.workload, context=None, concurrency=max(1, ceil(share)))
    if "session_len" not in base.fixed:
        workload = replace(workload, context=promise.context)
    joining = _Planner(replace(base, workload=workload, load_only=True), engine)
    # A batch bounds the answers a request: the second try gives each engine the promised ones.
    tries = [(joining, share), (joining, float(limits.n * len(_machine(node).visible)))]
    member = plan.node(node.id)
    if member is not None and member.plan is not None:
        # The plan counts on its share, which it may still hold.
        tries.insert(0, (_Planner(base, engine), member.at_once))
    serial = {other.plan.engine.serial for other in plan.nodes if other.plan is not None}
    for planner, requests in tries:
        tried = planner.plan(kind, requests, promise)
        why = tried.why_not or promise.why_broken(tried.served, planner.unit)
        if not why and serial and tried.served.engine.serial not in serial:
            why = f"only {tried.served.engine.name} serves on it: not mixed with LMDeploy's engines"
        why = why or _below(tried.served.limits, limits)
        if not why:
            joined = _held_to(tried.served, limits, promise)
            return replace(node_plan, plan=joined, at_once=min(requests, share))
    return replace(node_plan, why_not=why)


def _share(plan: ClusterPlan, node: Node) -> float:
    """The requests that the plan has for as many cards: on this node, else on all of its nodes."""
    used = [member for member in plan.nodes if member.plan is not None]
    used = [member for member in used if member.node == node.id] or used
    cards = sum(len(member.gpus()) for member in used)
    return max(1.0, sum(member.at_once for member in used) * len(_machine(node).visible) / cards)


def _named(node: Node) -> NodePlan:
    cards = cards_of(node.machine)
    return NodePlan(node=node.id, name=node.name, address=node.address, cards=cards)


def _held_to(plan: Plan, limits: Limits, promise: Promise) -> Plan:
    """A plan whose own gateway refuses what others' would: a request may go to any node."""
    forward = plan.limits.units_per_forward  # its own gateway queues by it
    longest = plan.kv.longest_request_tokens
    if promise.context is not None:
        longest = min(longest, promise.context)
    return replace(
        plan,
        limits=replace(limits, units_per_forward=forward),
        kv=replace(plan.kv, longest_request_tokens=longest),
    )


def _common(all_limits: Sequence[Limits]) -> Limits:
    """What all hold: field by field the least; None where it has no meaning."""
    least: dict[str, Any] = {}
    for field in fields(Limits):
        values = [getattr(limits, field.name) for limits in all_limits]
        known = [value for value in values if isinstance(value, int)]
        least[field.name] = min(known) if known else values[0]
    return Limits(**least)


def _below(limits: Limits, promised: Limits) -> str:
    """Which promised limit is larger than a node's own."""
    for field in fields(Limits):
        least, have = getattr(promised, field.name), getattr(limits, field.name)
        if field.name != "units_per_forward" and isinstance(least, int) and have < least:
            return f"{field.name} is {have:,} on it, {least:,} are promised"
    return ""


def _sum(speeds: Sequence[Throughput | None]) -> Throughput | None:
    known = [speed for speed in speeds if speed is not None]
    if not known or len(known) < len(speeds):
        return None
    return replace(
        known[0],
        requests_per_second=round(sum(speed.requests_per_second for speed in known), 4),
        output_tokens_per_second=round(sum(speed.output_tokens_per_second for speed in known), 1),
        concurrent_requests=sum(speed.concurrent_requests for speed in known),
        seconds_to_first_token=max(speed.seconds_to_first_token for speed in known),
        host=None,  # each node's figure has its own host in it
    )


def _held(planner: _Planner, plans: Sequence[Plan], choice: _Choice | None) -> Held | UnsetType:
    if planner.base.promised_requests is None:
        return UNSET
    chosen = choice.plans.values() if choice is not None else ()
    parts = [plan.held for plan in plans or chosen if plan.held is not UNSET]
    requests = sum(part.requests for part in parts)
    if not plans:
        requests = 0 if choice is None else round(planner.at_once(choice.shares))
    size = max((part.request_tokens for part in parts), default=0)
    return Held(requests=requests, request_tokens=size)


def _left_out(planner: _Planner, trial: _Tried, choice: _Choice | None) -> str:
    """Why a node that can be planned for does not serve."""
    if trial.why_not or choice is None:
        return trial.why_not
    if not planner.holds_all(choice):
        count, wanted = round(planner.at_once(choice.shares)), planner.requests
        return f"all nodes together hold {count:,} of {wanted:,} requests at once"
    why = choice.promise.why_broken(trial.served, planner.unit)
    if not why and not trial.served.engine.of_lmdeploy:
        return f"only {trial.served.engine.name} serves on it: not mixed with LMDeploy's engines"
    context = choice.promise.context or 0
    return why or f"holds less than {context:,} tokens with its share of the requests"


def _verdict(plan: ClusterPlan) -> str:
    name, nodes = plan.model.name, plan.nodes
    if not nodes:
        return f"does not fit: {name}: the cluster has no nodes"
    if not plan.fits and plan.held is not UNSET and plan.held.requests:
        at_once, wanted = plan.held, plan.workload.concurrency or 0
        return (
            f"does not fit: {name} with --concurrency {wanted}: the cache of"
            f" {_count(len(nodes), 'node')} holds {at_once.requests:,} of {wanted:,} requests of"
            f" {at_once.request_tokens:,} tokens"
        )
    if not plan.fits:
        why = Counter(node.why_not for node in nodes).most_common(_MOST_CAUSES)
        causes = "; ".join(f"{_count(n, 'node')}: {text}" for text, n in why)
        return f"does not fit: {name} on none of {_count(len(nodes), 'node')}: {causes}"
    used = [node.plan for node in nodes if node.plan is not None]
    gpus = sum(len(served.gpus) for served in used)
    return (
        f"fits: {name} on {len(used):,} of {_count(len(nodes), 'node')}, {_count(gpus, 'GPU')},"
        f" {_count(plan.engines, 'engine')}: {plan.total_tokens:,} KV tokens; a request of up to"
        f" {plan.longest_request_tokens:,} tokens may go to any of them"
    )


def _reasons(planner: _Planner, limits: Limits, choice: _Choice) -> Iterator[str]:
    """Where images have a limit: whose it is."""
    base, limit, rule = planner.base, choice.promise.limit, planner.base.model.image_rule
    if limit is None or rule is None or limits.vision_unit is None:
        return
    why = "the model's own; nodes that cannot serve it are left out"
    if base.limit is not None or base.workload.image_size is not None:
        why = "as set by you"
    elif limit != base.requested_limit:
        why = f"the largest of any node; none serves the model's own {base.requested_limit}"
    yield f"{rule.limit_name} {limit}: {why}"


def _warnings(cluster: Cluster, plan: ClusterPlan) -> Iterator[str]:
    left = Counter(node.why_not for node in plan.nodes if node.why_not)
    if plan.fits:
        for why, n in left.most_common():
            yield f"{_count(n, 'node')} left out: {why}"
    pretend = sum(node.pretend for node in cluster.nodes)
    if pretend:
        yield f"{_count(pretend, 'node')} of {len(cluster.nodes):,} with pretend GPUs"
    used = [node.plan for node in plan.nodes if node.plan is not None]
    dtypes = sorted({served.settings.dtype for served in used})
    if len(dtypes) > 1:
        yield (
            f"nodes compute in {' and '.join(dtypes)}, as their cards can: the same request may be"
            " answered differently; --dtype float16 makes them one"
        )
    engines = sorted({served.engine.name for served in used})
    if len(engines) > 1:
        yield f"nodes run {' and '.join(engines)}: answers may differ in wording"
    texts = (
        text for served in used for text in served.warnings if not text.startswith("not used: ")
    )
    yield from dict.fromkeys(texts)


def _remedies(
    planner: _Planner, tried: Mapping[Kind, _Tried], choice: _Choice | None
) -> Iterator[Remedy]:
    """What would make it fit: as many requests as are held, or of each kind the cheapest change."""
    if choice is not None:
        if fewer := round(planner.at_once(choice.shares)):
            effect = f"fits: {_count(fewer, 'request')} at once over all nodes"
            yield Remedy(change=f"--concurrency {fewer}", effect=effect)
        return
    for kind, trial in tried.items():
        where = f"{_count(len(kind.nodes), 'node')} of {cards_of(kind.machine)}"
        remedies = trial.plan.remedies if trial.plan is not None else ()
        fitting = [remedy for remedy in remedies if remedy.effect.startswith("fits")]
        for remedy in fitting[:1]:
            yield replace(remedy, effect=f"{where}: {remedy.effect}")


def cards_of(machine: Machine | None) -> str:
    """Visible cards as people say them; empty where nothing was measured."""
    if machine is None:
        return ""
    names = Counter(machine.gpu(index).name for index in machine.visible)
    return " + ".join(f"{n}x {name}" for name, n in names.items())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# Nodes of equal cards that are equally full are planned once.


#: Free host memory within so much is alike: the least of it is planned for.
_HOST_STEP: Final = 8 * GIB


class Kind(Struct, eq=False):  # a key of dictionaries: no machines are compared
    """Nodes that run the same settings; ``machine`` is what these are planned for."""

    machine: Machine
    nodes: tuple[Node, ...]

    def on(self, node: Node, plan: Plan) -> Plan:
        """The kind's plan under a member's own names."""
        machine = _machine(node)
        gpus = (replace(ledger, uuid=machine.gpu(ledger.index).uuid) for ledger in plan.gpus)
        return replace(plan, machine=machine, gpus=tuple(gpus))


def why_unusable(node: Node) -> str:
    """Why a node cannot be planned for, before any memory is counted; empty where it can."""
    if node.machine is None:
        return node.why_not or "it was not measured"
    if not node.machine.visible:
        return node.why_not or "it has no GPU that may be used"
    if node.turbofit and node.turbofit != __version__:  # snapshots and SPECs tell no version
        return (
            f"it has turbofit {node.turbofit}, this one is {__version__}: its memory would be"
            " measured and its engines be started by other rules"
        )
    if node.lmdeploy and release(node.lmdeploy) != release(REFERENCE):
        return f"it has LMDeploy {node.lmdeploy}, and plans are for {REFERENCE}"
    return node.why_not


def kinds_of(nodes: Sequence[Node]) -> tuple[Kind, ...]:
    by_kind: dict[Hashable, list[Node]] = {}
    for node in nodes:
        by_kind.setdefault(_kind_key(_machine(node)), []).append(node)
    return tuple(
        Kind(machine=min(map(_machine, members), key=_host_room), nodes=tuple(members))
        for members in by_kind.values()
    )


def _host_room(machine: Machine) -> int:
    return known(machine.host.ram_available, maxsize)


def _kind_key(machine: Machine) -> Hashable:
    """What planning reads of a machine: the same for all nodes of a kind."""
    gpus = tuple(replace(gpu, uuid="", holders=()) for gpu in machine.gpus)
    learned = tuple(replace(calibration, when="") for calibration in machine.calibrations)
    alike = replace(
        machine, name="", source="", gpus=gpus, host=Host(), warnings=(), cuda=NA,
        driver=machine.driver if learned else NA, calibrations=learned,
    )  # fmt: skip
    return alike, _host_room(machine) // _HOST_STEP


def _machine(node: Node) -> Machine:
    assert node.machine is not None
    return node.machine
