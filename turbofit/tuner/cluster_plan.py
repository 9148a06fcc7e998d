"""Plans a cluster: each kind of node alone, then all nodes under one promise.

The promise is the largest that some kind of node can keep: first the image limit (the wished one if
a kind serves it), then the context. Nodes that cannot keep it are left out and do not lower it. All
nodes that keep the promise share the concurrency; if together they hold less than it, a shorter
context with more nodes is promised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from math import ceil
from typing import Any, Final

from msgspec import UNSET, UnsetType
from msgspec.structs import fields, replace

from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Machine
from turbofit.core.plan import Held, Limits, Plan, Remedy, Throughput
from turbofit.core.struct import Struct
from turbofit.core.version import __version__
from turbofit.tuner.choose import plan_best
from turbofit.tuner.cluster_nodes import Kind, cards_of, kinds_of, machine_of, why_unusable
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import evenly, held_shares
from turbofit.tuner.verdict import Planned, Verdict, first_fitting, fitting, not_planned

_ALMOST: Final = 1e-6
#: The most contexts to try if all requests must be held, and the most causes in a verdict.
_MOST_CONTEXTS: Final = 8
_MOST_CAUSES: Final = 3


class Promise(Struct):
    """The promise to clients: image limit (tiles or pixels) and context; None: each node's own."""

    image_limit: int | None = None
    context: int | None = None

    def is_all_of(self, plan: Plan) -> bool:
        """Whether a plan keeps exactly this promise."""
        image_limit, context = plan.limits.image_limit, plan.kv.longest_request_tokens
        return self.image_limit in (None, image_limit) and self.context in (None, context)

    def why_broken(self, plan: Plan, unit: str) -> str:
        """The reason why a plan breaks the promise; empty if the plan keeps the promise."""
        served, most = plan.limits.image_limit, plan.kv.longest_request_tokens
        wanted = self.image_limit
        if wanted is not None and served is not None and served < wanted:
            return f"serves images of {served:,} {unit} at most, {wanted:,} are promised"
        if self.context is not None and most < self.context:
            return f"holds {most:,} tokens under the promised images, {self.context:,} are promised"
        return ""


#: No promise: each node serves what it can.
_ALONE: Final = Promise()


class _Choice(Struct):
    """A promise, the kinds of nodes that keep it, and a node's plan and requests for each kind."""

    promise: Promise
    shares: dict[Kind, float]
    plans: dict[Kind, Plan]

    @property
    def at_once(self) -> float:
        """The number of requests that all nodes together hold at once."""
        return sum(share * len(kind.nodes) for kind, share in self.shares.items())


class _Planner:
    def __init__(self, base: ResolvedRequest, engine: str) -> None:
        self.base, self.engine = replace(base, compares_limits=False), engine
        self.requests = base.workload.concurrency
        self.errors: list[TurbofitError] = []
        self._made: dict[tuple[Kind, int | None, Promise], Planned] = {}
        rule = base.model.image_rule
        self.unit = "" if rule is None else rule.limit_unit

    def plan(self, kind: Kind, share: float, promise: Promise = _ALONE) -> Planned:
        """The plan of a kind for a share of requests; the one without a promise, if it suffices."""
        requests = None if self.requests is None else max(1, ceil(share - _ALMOST))
        key = (kind, requests, promise)
        if key not in self._made:
            planned = None if promise == _ALONE else self.plan(kind, share)
            if planned is None or not planned.fits or not promise.is_all_of(planned.document):
                planned = self._planned(kind.machine, requests, promise)
            self._made[key] = planned
        return self._made[key]

    def _planned(self, machine: Machine, requests: int | None, promise: Promise) -> Planned:
        base, free = self.base, self.base.image_limit is None
        workload = replace(base.workload, concurrency=requests)
        if promise.context is not None and not base.context_given:
            workload = replace(workload, context=promise.context)
        request = replace(base, machine=machine, workload=workload)
        if promise.image_limit is not None and free and base.workload.image_size is None:
            request = replace(request, image_limit=promise.image_limit)
        try:
            return plan_best(request, self.engine)
        except TurbofitError as error:
            self.errors.append(error)
            return not_planned(error.message)

    def alone(self, kinds: Sequence[Kind]) -> dict[Kind, Planned]:
        """The plan of each kind without a promise, with its share of the requests.

        Raises:
            TurbofitError: nothing can be planned on any kind.
        """
        planned = {kind: self.plan(kind, share) for kind, share in self.shares(kinds).items()}
        if planned and all(each.plan is None for each in planned.values()):
            raise self.errors[0]
        return planned

    def shares(self, members: Sequence[Kind], promise: Promise = _ALONE) -> dict[Kind, float]:
        """The requests of one node of each kind: its share, or its own batch if that is smaller."""
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
        """The forecast speed of a node of this kind; nodes share requests in proportion to it."""
        planned = self.plan(kind, 1.0)
        speed = planned.document.throughput if planned.fits else None
        return speed.requests_per_second if speed else 0.01 * len(kind.machine.visible)

    def holds_all(self, choice: _Choice) -> bool:
        wanted = (self.requests or 0) * (1 - _ALMOST)
        return bool(choice.plans) and choice.at_once >= wanted

    def choose(self, alone: Mapping[Kind, Planned]) -> _Choice | None:
        """The best promise that holds all requests, or else holds the most of them.

        None if no kind of node serves the model. LMDeploy's engines are never mixed with another.
        """
        serving = {kind: planned.document for kind, planned in alone.items() if planned.fits}
        serving = {k: plan for k, plan in serving.items() if plan.engine.of_lmdeploy} or serving
        if not serving:
            return None
        tried = []
        for promise in self._promises(list(serving.values())):
            tried.append(self._kept(promise, serving))
            if self.holds_all(tried[-1]):
                return tried[-1]
        return max(tried, key=lambda choice: choice.at_once)

    def _promises(self, plans: Sequence[Plan]) -> Iterator[Promise]:
        """Yield promises: the largest image limit of any kind, with its contexts, longest first.

        A given context is the only one.
        """
        image_limit = max((plan.limits.image_limit or 0 for plan in plans), default=0) or None
        of_limit = [plan for plan in plans if plan.limits.image_limit == image_limit]
        contexts = {plan.kv.longest_request_tokens for plan in of_limit}
        if self.base.workload.context is not None:
            contexts = {self.base.workload.context}
        for context in sorted(contexts, reverse=True)[:_MOST_CONTEXTS]:
            yield Promise(image_limit=image_limit, context=context)

    def _kept(self, promise: Promise, alone: Mapping[Kind, Plan]) -> _Choice:
        """The kinds that together keep a promise, with their shares and plans."""
        members = [k for k, plan in alone.items() if not promise.why_broken(plan, self.unit)]
        while members:
            shares = self.shares(members, promise)
            planned = {kind: self.plan(kind, shares[kind], promise) for kind in members}
            short = {kind for kind, each in planned.items() if self._breaks(each, promise)}
            if not short:
                plans = {kind: each.document for kind, each in planned.items()}
                return _Choice(promise=promise, shares=shares, plans=plans)
            shorter = self._shortened(promise, shares) if len(short) == len(members) else None
            if shorter is None:
                members = [kind for kind in members if kind not in short]
            else:
                promise = shorter
        return _Choice(promise=promise, shares={}, plans={})

    def _breaks(self, planned: Planned, promise: Promise) -> bool:
        return not planned.fits or bool(promise.why_broken(planned.document, self.unit))

    def _shortened(self, promise: Promise, shares: Mapping[Kind, float]) -> Promise | None:
        """The promise with the longest context that some kind holds with its share of requests.

        A larger batch leaves a little less cache. None if no shorter context helps, or it was
        given.
        """
        if self.base.context_given:
            return None
        free = Promise(image_limit=promise.image_limit)
        planned = [self.plan(kind, share, free) for kind, share in shares.items()]
        held = (each.document.kv.longest_request_tokens for each in planned if each.fits)
        longest = max(held, default=0)
        return replace(promise, context=longest) if 0 < longest < (promise.context or 0) else None


def make_cluster_plan(base: ResolvedRequest, cluster: Cluster, engine: str = "auto") -> ClusterPlan:
    """Plan every node, all with one promise; command lines are not made.

    ``tp`` and ``replicas`` are for each node, ``concurrency`` is shared by all; the machine of
    ``base`` is not used.

    Raises:
        TurbofitError: a part of the request cannot be used on any node.
    """
    planner = _Planner(base, engine)
    kinds = kinds_of([node for node in cluster.nodes if not why_unusable(node)])
    # The plan of each kind alone limits what can be promised.
    alone = planner.alone(kinds)
    # One promise for all: the largest that holds all requests; and the kinds that keep it.
    choice = planner.choose(alone)
    kept = choice if choice is not None and planner.holds_all(choice) else None
    limits = _common([plan.limits for plan in kept.plans.values()]) if kept else None
    found = _Found(planner=planner, alone=alone, choice=choice, kept=kept, limits=limits)
    # The plan of each node, or why it is left out.
    kind_of = {node.id: kind for kind in kinds for node in kind.nodes}
    nodes = [found.node_plan(node, kind_of.get(node.id)) for node in cluster.nodes]
    return _document(cluster, found, nodes)


class _Found(Struct):
    """The result of the search: each kind alone, and the best promise (None if none serves).

    ``kept`` is that promise if it holds all requests; ``limits`` are then those of every node.
    """

    planner: _Planner
    alone: dict[Kind, Planned]
    choice: _Choice | None
    kept: _Choice | None
    limits: Limits | None

    def node_plan(self, node: Node, kind: Kind | None) -> NodePlan:
        """The plan of a node under the promise, or the reason why it serves nothing."""
        kept, limits = self.kept, self.limits
        if kind is None:
            return _unserved(node, why_unusable(node))
        if kept is None or limits is None or kind not in kept.plans:
            return _unserved(node, self._left_out(kind))
        plan = kind.on(node, _held_to(kept.plans[kind], limits, kept.promise))
        first = node is kind.nodes[0]
        plan = replace(plan, considered=plan.considered if first else ())
        return replace(_unserved(node), plan=plan, at_once=kept.shares[kind])

    def _left_out(self, kind: Kind) -> str:
        """The reason why nodes of a kind do not serve."""
        planned, choice = self.alone[kind], self.choice
        if not planned.fits or choice is None:
            return planned.why_not
        if not self.planner.holds_all(choice):
            count, wanted = round(choice.at_once), self.planner.requests
            return f"all nodes together hold {count:,} of {wanted:,} requests at once"
        why = choice.promise.why_broken(planned.document, self.planner.unit)
        if not why and not planned.document.engine.of_lmdeploy:
            return _not_mixed(planned.document)
        context = choice.promise.context or 0
        return why or f"holds less than {context:,} tokens with its share of the requests"

    def held(self, plans: Sequence[Plan]) -> Held | UnsetType:
        """The requests at once that the nodes' ``plans`` hold, or that the best promise would."""
        if self.planner.base.promised_requests is None:
            return UNSET
        chosen = self.choice.plans.values() if self.choice is not None else ()
        parts = [plan.held for plan in plans or chosen if plan.held is not UNSET]
        requests = sum(part.requests for part in parts)
        if not plans:
            requests = 0 if self.choice is None else round(self.choice.at_once)
        size = max((part.request_tokens for part in parts), default=0)
        return Held(requests=requests, request_tokens=size)

    def reasons(self) -> Iterator[str]:
        """Yield the reason for the image limit, if images have one."""
        base, limits, rule = self.planner.base, self.limits, self.planner.base.model.image_rule
        image_limit = self.kept.promise.image_limit if self.kept is not None else None
        if image_limit is None or limits is None or rule is None or limits.vision_unit is None:
            return
        why = "the model's own; nodes that cannot serve it are left out"
        if base.image_limit is not None or base.workload.image_size is not None:
            why = "as set by you"
        elif image_limit != base.requested_image_limit:
            why = (
                f"the largest of any node; none serves the model's own {base.requested_image_limit}"
            )
        yield f"{rule.limit_name} {image_limit}: {why}"

    def remedies(self) -> Iterator[Remedy]:
        """Yield remedies: fewer requests at once, or for each kind the cheapest change."""
        if self.kept is not None:
            return
        if self.choice is not None:
            if fewer := round(self.choice.at_once):
                found = f"{_count(fewer, 'request')} at once over all nodes"
                yield fitting(f"--concurrency {fewer}", found)
            return
        for kind, planned in self.alone.items():
            where = f"{_count(len(kind.nodes), 'node')} of {cards_of(kind.machine)}"
            if (remedy := first_fitting(planned)) is not None:
                yield replace(remedy, effect=f"{where}: {remedy.effect}")


def _document(cluster: Cluster, found: _Found, nodes: Sequence[NodePlan]) -> ClusterPlan:
    base = found.planner.base
    plans = [node.plan for node in nodes if node.plan is not None]
    longest = min((plan.kv.longest_request_tokens for plan in plans), default=0)
    document = ClusterPlan(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=cluster.source,
        fits=found.kept is not None,
        verdict="",
        model=base.model,
        workload=replace(base.workload, context=base.workload.context or longest or None),
        limits=found.limits,
        longest_request_tokens=longest,
        total_tokens=sum(plan.kv.total_tokens for plan in plans),
        engines=sum(plan.parallel.replicas for plan in plans),
        nodes=tuple(nodes),
        throughput=_sum([plan.throughput for plan in plans]),
        held=found.held(plans),
        reasons=tuple(found.reasons()),
        remedies=tuple(found.remedies()),
    )
    verdict = _verdict(document).text
    return replace(document, verdict=verdict, warnings=tuple(_warnings(cluster, document)))


def plan_joining_node(
    base: ResolvedRequest, plan: ClusterPlan, node: Node, engine: str = "auto"
) -> NodePlan:
    """The plan of a joining node under a plan's promise; other nodes do not change.

    ``base`` is the request of the plan; its machine is not used. Command lines are not made.
    """
    why, limits = why_unusable(node), plan.limits
    if why or limits is None:
        return _unserved(node, why or "nothing is promised: no node served")
    promise = Promise(image_limit=limits.image_limit, context=plan.longest_request_tokens)
    share, (kind,) = _share(plan, node), kinds_of([node])
    # An additional node is planned for its share; this is no promise, since the others hold all.
    workload = replace(plan.workload, context=None, concurrency=max(1, ceil(share)))
    if "session_len" not in base.engine_options:
        workload = replace(workload, context=promise.context)
    joining = _Planner(replace(base, workload=workload, load_only=True), engine)
    # The batch limits the answers of a request: the second try gives each engine the promised
    # number.
    tries = [(joining, share), (joining, float(limits.n * len(machine_of(node).visible)))]
    member = plan.node(node.id)
    if member is not None and member.plan is not None:
        # The plan counts on the node's share, which the node may still hold.
        tries.insert(0, (_Planner(base, engine), member.at_once))
    for planner, requests in tries:
        planned = planner.plan(kind, requests, promise)
        why = planned.why_not or promise.why_broken(planned.document, planner.unit)
        why = why or _why_apart(planned.document, plan) or _below(planned.document.limits, limits)
        if not why:
            joined = _held_to(planned.document, limits, promise)
            return replace(_unserved(node), plan=joined, at_once=min(requests, share))
    return _unserved(node, why)


def _why_apart(joining: Plan, plan: ClusterPlan) -> str:
    """The reason why an engine cannot serve beside those of a plan; empty if it can."""
    serial = {node.plan.engine.serial for node in plan.nodes if node.plan is not None}
    return _not_mixed(joining) if serial and joining.engine.serial not in serial else ""


def _not_mixed(plan: Plan) -> str:
    return f"only {plan.engine.name} serves on it: not mixed with LMDeploy's engines"


def _share(plan: ClusterPlan, node: Node) -> float:
    """The requests that the plan assigns to as many cards: on this node, else on average."""
    used = [member for member in plan.nodes if member.plan is not None]
    used = [member for member in used if member.node == node.id] or used
    cards = sum(len(member.gpus()) for member in used)
    return max(1.0, sum(member.at_once for member in used) * len(machine_of(node).visible) / cards)


def _unserved(node: Node, why_not: str = "") -> NodePlan:
    """A node without a plan, or for which none is possible."""
    cards = cards_of(node.machine)
    return NodePlan(
        node=node.id, name=node.name, address=node.address, cards=cards, why_not=why_not
    )


def _held_to(plan: Plan, limits: Limits, promise: Promise) -> Plan:
    """The plan with the limits of all nodes, since a request may go to any of them."""
    forward = plan.limits.units_per_forward  # its own gateway queues by this
    longest = plan.kv.longest_request_tokens
    if promise.context is not None:
        longest = min(longest, promise.context)
    return replace(
        plan,
        limits=replace(limits, units_per_forward=forward),
        kv=replace(plan.kv, longest_request_tokens=longest),
    )


def _common(all_limits: Sequence[Limits]) -> Limits:
    """The limits that all nodes hold: the least of each field; None if it has no meaning."""
    least: dict[str, Any] = {}
    for field in fields(Limits):
        values = [getattr(limits, field.name) for limits in all_limits]
        known = [value for value in values if isinstance(value, int)]
        least[field.name] = min(known) if known else values[0]
    return Limits(**least)


def _below(limits: Limits, promised: Limits) -> str:
    """Words for the first promised limit that exceeds the node's own; empty without one."""
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
        host=None,  # each node's figure already includes its host
    )


def _verdict(plan: ClusterPlan) -> Verdict:
    name, every = plan.model.name, _count(len(plan.nodes), "node")
    if not plan.nodes:
        return Verdict(subject=name, why_not="the cluster has no nodes")
    if plan.fits:
        used = [node.plan for node in plan.nodes if node.plan is not None]
        gpus = sum(len(served.gpus) for served in used)
        found = (
            f"on {len(used):,} of {every}, {_count(gpus, 'GPU')}, {_count(plan.engines, 'engine')}:"
            f" {plan.total_tokens:,} KV tokens; a request of up to"
            f" {plan.longest_request_tokens:,} tokens may go to any of them"
        )
        return Verdict(subject=name, found=found)
    if plan.held is not UNSET and plan.held.requests:
        held, wanted = plan.held, plan.workload.concurrency or 0
        why = (
            f"the cache of {every} holds {held.requests:,} of {wanted:,} requests of"
            f" {held.request_tokens:,} tokens"
        )
        return Verdict(subject=name, why_not=why, causes=(f"--concurrency {wanted}",))
    whys = Counter(node.why_not for node in plan.nodes).most_common(_MOST_CAUSES)
    why = "; ".join(f"{_count(n, 'node')}: {text}" for text, n in whys)
    return Verdict(subject=f"{name} on none of {every}", why_not=why)


def _warnings(cluster: Cluster, plan: ClusterPlan) -> Iterator[str]:
    left = Counter(node.why_not for node in plan.nodes if node.why_not)
    for why, n in left.most_common() if plan.fits else ():
        yield f"{_count(n, 'node')} left out: {why}"
    pretend = sum(node.pretend for node in cluster.nodes)
    if pretend:
        yield f"{_count(pretend, 'node')} of {len(cluster.nodes):,} with pretend GPUs"
    used = [node.plan for node in plan.nodes if node.plan is not None]
    yield from _unlike_answers(used)
    texts = dict.fromkeys(text for served in used for text in served.warnings)
    yield from (text for text in texts if not text.startswith("not used: "))


def _unlike_answers(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield reasons why two nodes may answer the same request differently."""
    dtypes = sorted({plan.settings.dtype for plan in plans})
    if len(dtypes) > 1:
        yield (
            f"nodes compute in {' and '.join(dtypes)}, as their cards can: the same request may be"
            " answered differently; --dtype float16 makes them one"
        )
    engines = sorted({plan.engine.name for plan in plans})
    if len(engines) > 1:
        yield f"nodes run {' and '.join(engines)}: answers may differ in wording"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
