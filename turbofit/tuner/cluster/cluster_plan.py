"""The plan of a cluster: kinds alone, one promise, and every node's own plan under it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

from msgspec import UNSET, UnsetType
from msgspec.structs import fields, replace

from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan, Span
from turbofit.core.plan import Held, Limits, Plan, Remedy, Throughput
from turbofit.core.struct import Struct
from turbofit.core.version import __version__
from turbofit.tuner.cluster import messages
from turbofit.tuner.cluster.fitness import why_unusable
from turbofit.tuner.cluster.kind_planner import KindPlan, KindPlanner
from turbofit.tuner.cluster.kinds import Rounding, kinds_of
from turbofit.tuner.cluster.promise import Choice, choose, even_shares
from turbofit.tuner.cluster.spans import Team, span_engine, span_request, teams
from turbofit.tuner.explain.remedies import Change, left_to_turbofit, quantised_cache
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.speed.throughput import Speed, total

__all__ = ["common_limits", "make_cluster_plan"]


class _Served(Struct):
    """What was chosen, each node's plan by its id, and each engine's forecast.

    There are no plans where the nodes together hold fewer requests at once than are asked for.
    """

    choice: Choice
    weighed: tuple[Choice, ...]
    plans: dict[str, NodePlan]
    throughput: Throughput | None


class _Spanned:
    """Engines over several nodes: teams, and how they were planned."""

    def __init__(
        self, teams: tuple[Team, ...], served: _Served, planner: KindPlanner, rounding: Rounding
    ) -> None:
        self.teams, self.served, self.planner, self.rounding = teams, served, planner, rounding

    @property
    def worth(self) -> tuple[float, ...]:
        """What is compared between kinds of cards; requests at once where they are too few."""
        choice, fits = self.served.choice, bool(self.served.plans)
        held = 0.0 if fits else self.planner.at_once(choice.shares)
        return (fits, held, choice.served, choice.value)


def make_cluster_plan(base: ResolvedRequest, cluster: Cluster, engine: str = "auto") -> ClusterPlan:
    """Plan every node for itself and all under one promise, without the command lines.

    Args:
        base: what is asked; ``tp`` and ``replicas`` are of each node, ``concurrency`` is shared by
            all. Its machine is not read.
        cluster: the nodes as they were measured.
        engine: as for :func:`turbofit.tuner.choose.best_plan`.

    Raises:
        UsageError: something asked for cannot be used on any node.
        PackageError: turbofit has no account for the engine.
    """
    unusable = {node.id: why_unusable(node) for node in cluster.nodes}
    usable = [node for node in cluster.nodes if not unusable[node.id]]
    planner, alone, rounding = _kinds_alone(base, usable, engine)
    served = _served(planner, {k: one.serves for k, one in alone.items() if not one.why_not})
    spanned = _spanned(base, usable, engine) if served is None else None
    if spanned is None and alone and all(tried.plan is None for tried in alone.values()):
        raise planner.errors[0]
    nodes = tuple(_node(planner, node, unusable, alone, served) for node in cluster.nodes)
    if rounding.span:
        nodes = tuple(_evaluation_by_others(one, unusable) for one in nodes)
    if spanned is not None and spanned.served.plans:
        return _over_nodes(cluster, nodes, spanned)
    if spanned is not None:
        planner, served = spanned.planner, spanned.served
    return _document(planner, cluster, nodes, served, alone, rounding)


def _kinds_alone(
    base: ResolvedRequest, nodes: list[Node], engine: str
) -> tuple[KindPlanner, dict[int, KindPlan], Rounding]:
    """The nodes by kind, and each kind by itself.

    Nodes that serve nothing when they are counted as full as others are folded again among
    themselves, where fewer of them allow a finer rounding.
    """
    exact = base.budget is not None
    kinds, rounding = kinds_of(nodes, exact=exact)
    planner = KindPlanner(base, kinds, engine)
    alone = _alone(planner)
    rejected = [n for k, one in alone.items() if one.why_not for n in planner.kinds[k].nodes]
    if not rounding.span or not rejected:
        return planner, alone, rounding
    again, finer = kinds_of(rejected, exact=exact)
    if finer.step >= rounding.step:
        return planner, alone, rounding
    serving = [kind for k, kind in enumerate(planner.kinds) if not alone[k].why_not]
    planner = KindPlanner(base, (*serving, *again), engine)
    return planner, _alone(planner), rounding


def _alone(planner: KindPlanner) -> dict[int, KindPlan]:
    """Each kind by itself, with an even share of the requests among those that serve."""
    members = list(range(len(planner.kinds)))
    if not members:
        return {}
    shares = even_shares(planner, members)
    tried = {k: planner.plan(k, shares[k]) for k in members}
    serving = [k for k in members if not tried[k].why_not]
    if serving and len(serving) < len(members):
        shares = even_shares(planner, serving)
        tried |= {k: planner.plan(k, shares[k]) for k in serving}
    return tried


def _served(planner: KindPlanner, alone: dict[int, Plan]) -> _Served | None:
    """The best promise on all its nodes; None where no node serves."""
    if not alone:
        return None
    choice, weighed = choose(planner, alone)
    if not planner.holds_all(choice.shares):
        return _Served(choice=choice, weighed=weighed, plans={}, throughput=None)
    plans: dict[str, NodePlan] = {}
    speeds: list[Speed] = []
    measured = []
    for k, share in choice.shares.items():
        kind = planner.kinds[k]
        first = planner.plan(k, share, choice.promise).serves
        each = planner.speed(first).engines(share)
        throughput = total(each, kind.machine.measured) if each else None
        for place, (node, tried) in enumerate(
            zip(kind.nodes, planner.on_nodes(k, share, choice.promise), strict=True)
        ):
            plans[node.id] = _planned(node, tried, share, throughput, keep=place == 0)
            if plans[node.id].plan is not None:
                speeds += each
                measured.append(kind.machine.measured)
    if not any(one.plan is not None for one in plans.values()):
        return None
    known = measured[0] if None not in measured else None
    whole = total(speeds, known) if speeds else None
    return _Served(choice=choice, weighed=weighed, plans=plans, throughput=whole)


def _planned(
    node: Node, tried: KindPlan, share: float, speed: Throughput | None, *, keep: bool
) -> NodePlan:
    """What one node serves; ``keep`` its table of what was considered."""
    made = _named(node)
    if tried.why_not:
        return replace(made, why_not=tried.why_not)
    plan = replace(tried.serves, throughput=speed, limit_costs=())
    return replace(made, plan=plan if keep else replace(plan, considered=()), at_once=share)


def _node(
    planner: KindPlanner,
    node: Node,
    unusable: dict[str, str],
    alone: dict[int, KindPlan],
    served: _Served | None,
) -> NodePlan:
    if served is not None and node.id in served.plans:
        return served.plans[node.id]
    why = unusable[node.id]
    if not why:
        number = planner.kind_of[node.id]
        why = alone[number].why_not
        if not why and served is not None and not served.plans:
            why = messages.too_few(planner, served.choice)
        elif not why and served is not None:
            why = messages.left_out(planner, alone[number].serves, served.choice)
    return replace(_named(node), why_not=why)


def _named(node: Node) -> NodePlan:
    cards = messages.cards_of(node.machine)
    return NodePlan(node=node.id, name=node.name, address=node.address, cards=cards)


def _evaluation_by_others(one: NodePlan, unusable: dict[str, str]) -> NodePlan:
    """The node with a word on whose bytes its reason tells."""
    if not one.why_not or unusable[one.node]:
        return one
    return replace(one, why_not=f"{one.why_not} (counted as full as the fullest of its kind)")


def common_limits(plans: list[Plan]) -> Limits:
    """What every one of these holds: field by field the least; None where it has no meaning."""
    first, *rest = [plan.limits for plan in plans]
    least: dict[str, Any] = {}
    for field in fields(Limits):
        values = [getattr(one, field.name) for one in (first, *rest)]
        known = [value for value in values if isinstance(value, int)]
        least[field.name] = min(known) if known else values[0]
    return Limits(**least)


def _spanned(base: ResolvedRequest, usable: list[Node], engine: str) -> _Spanned | None:
    """The teams of nodes that serve most; None where none does."""
    best: _Spanned | None = None
    runner = span_engine(base, engine)
    if runner is None:
        return None
    tried_cards: set[str] = set()
    for some in teams(base, usable, engine):
        card = f"{len(some[0].groups[0])} {some[0].machine.gpus[0].name}"
        if card in tried_cards:
            continue  # fewer nodes an engine do already
        kinds, rounding = kinds_of([team.as_node() for team in some])
        planner = KindPlanner(span_request(base, some[0], runner), kinds, runner.name)
        alone = _alone(planner)
        served = _served(planner, {k: one.serves for k, one in alone.items() if not one.why_not})
        if served is None:
            continue
        if served.plans:
            tried_cards.add(card)
        made = _Spanned(teams=some, served=served, planner=planner, rounding=rounding)
        if best is None or made.worth > best.worth:
            best = made
    return best


def _over_nodes(cluster: Cluster, nodes: tuple[NodePlan, ...], spanned: _Spanned) -> ClusterPlan:
    """The document of engines over several nodes."""
    planner, served = spanned.planner, spanned.served
    spans = []
    for team in spanned.teams:
        node_plan = served.plans.get(team.id)
        if node_plan is not None and node_plan.plan is not None:
            spans.append(
                Span(
                    nodes=tuple(node.id for node in team.nodes),
                    plan=messages.over_network(node_plan.plan),
                    groups=team.groups,
                    commands=(),
                    at_once=node_plan.at_once,
                )
            )
    taken = {identity for span in spans for identity in span.nodes}
    nodes = tuple(replace(one, why_not="") if one.node in taken else one for one in nodes)
    return _document(planner, cluster, nodes, served, {}, spanned.rounding, tuple(spans))


def _document(  # noqa: PLR0913 - the parts of one document
    planner: KindPlanner,
    cluster: Cluster,
    nodes: tuple[NodePlan, ...],
    served: _Served | None,
    alone: dict[int, KindPlan],
    rounding: Rounding,
    spans: tuple[Span, ...] = (),
) -> ClusterPlan:
    base = planner.base
    plans = [node.plan for node in nodes if node.plan is not None]
    plans += [span.plan for span in spans]
    longest = min((plan.kv.longest_request_tokens for plan in plans), default=0)
    context = base.workload.context or longest or None
    made = ClusterPlan(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=cluster.source,
        fits=bool(plans),
        verdict="",
        model=base.model,
        workload=replace(base.workload, context=context),
        limits=common_limits(plans) if plans else None,
        longest_request_tokens=longest,
        total_tokens=sum(plan.kv.total_tokens for plan in plans),
        engines=sum(plan.parallel.replicas for plan in plans),
        nodes=nodes,
        spans=spans,
        throughput=served.throughput if served else None,
        held=_held(planner, plans, served),
    )
    if served is not None and plans:
        return replace(
            made,
            verdict=messages.verdict(made),
            reasons=tuple(messages.reasons(planner, made, served.choice, rounding)),
            warnings=tuple(messages.warnings(cluster, made)),
            remedies=tuple(messages.gains(planner, served.choice, served.weighed)),
        )
    if served is None:
        remedies = tuple(messages.remedies(alone.values(), planner.kinds))
    else:
        remedies = tuple(_holding_all(planner, served.choice))
    return replace(
        made,
        verdict=messages.verdict(made),
        warnings=tuple(messages.warnings(cluster, made)),
        remedies=remedies,
    )


def _held(planner: KindPlanner, plans: Sequence[Plan], served: _Served | None) -> Held | UnsetType:
    """Requests at once that the nodes hold, where a person says how many there must be."""
    if planner.base.promised_requests is None:
        return UNSET
    if plans:
        each = [plan.held for plan in plans if plan.held is not UNSET]
        size = max((one.request_tokens for one in each), default=0)
        return Held(requests=sum(one.requests for one in each), request_tokens=size)
    if served is None:
        return Held(requests=0, request_tokens=0)
    choice, size = served.choice, 0
    for kind in choice.shares:
        held = planner.plan(kind, 1.0, choice.promise).serves.held
        size = max(size, 0 if held is UNSET else held.request_tokens)
    return Held(requests=round(planner.at_once(choice.shares)), request_tokens=size)


def _holding_all(planner: KindPlanner, choice: Choice) -> Iterator[Remedy]:
    """What makes the same nodes hold all requests at once, and how many of them they hold."""
    for changes in _changes(planner, choice):
        for change in changes:
            tried = KindPlanner(change.request, planner.kinds, planner.engine)
            alone = {k: one.serves for k, one in _alone(tried).items() if not one.why_not}
            found = _served(tried, alone)
            if found is not None and found.plans:
                requests = messages.count(change.request.workload.concurrency or 0, "request")
                effect = f"fits: {requests} at once over all nodes"
                yield Remedy(change=change.change, effect=effect)
                break


def _changes(planner: KindPlanner, choice: Choice) -> Iterator[list[Change]]:
    """Changes of a kind together, of which the first that does is enough."""
    base, rule = planner.base, planner.base.model.image_rule
    yield from ([change] for change in left_to_turbofit(base))
    if rule is not None and choice.promise.limit is not None and rule.varies_by_limit:
        lower = [one for one in rule.common_limits if one < choice.promise.limit]
        lower.sort(reverse=True)
        yield [Change(f"{rule.limit_option} {one}", base.with_limit(one)) for one in lower]
    yield from ([change] for change in quantised_cache(base))
    held = round(planner.at_once(choice.shares))
    if held:
        fewer = replace(base.workload, concurrency=held)
        yield [Change(f"--concurrency {held}", replace(base, workload=fewer))]
