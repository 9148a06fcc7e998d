"""Plans a cluster: one promise, and a plan that keeps it for each kind of node.

The promise is an image limit and a context. A promise that the person gives is kept. Otherwise the
best kind of node sets the promise: the kind with the largest image limit, then with the largest
context. So a weak node never makes the promise smaller. A node that does not keep the promise is
left out; its reason says what the node would keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from datetime import datetime, timezone
from sys import maxsize
from typing import Final

from msgspec.structs import replace

from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Host, Machine, named_cards
from turbofit.core.messages import counted
from turbofit.core.plan import Plan, Remedy
from turbofit.core.promise import Promise
from turbofit.core.struct import NA, known
from turbofit.core.units import GIB, grouped
from turbofit.core.version import __version__
from turbofit.planning.choose import plan_best
from turbofit.planning.own_drafts import draft_warnings
from turbofit.planning.plan_document import on_machine
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.planning.verdict import Planned, Verdict, all_fitting

#: The free host memory of a kind's nodes may differ by this much; the plan counts the least.
_HOST_STEP: Final = 8 * GIB
#: The most causes in a verdict.
_MOST_CAUSES: Final = 3
#: Nodes that are equal for planning, and their plan.
_Kinds = Sequence[tuple[Sequence[Node], Planned]]


def make_cluster_plan(
    base: ResolvedRequest,
    cluster: Cluster,
    engine: str = "auto",
    promised: ClusterPlan | None = None,
) -> ClusterPlan:
    """Plan every node as one machine, all with one promise; command lines are not made.

    ``base`` is the request: its machine is not used, and its number of concurrent requests is for
    all nodes together. ``promised`` is an earlier plan of the same request whose promise these
    nodes must keep.

    Raises:
        TurbofitError: a part of the request cannot be used on any node.
    """
    base = replace(base, compares_limits=False)
    at_once = base.workload.concurrency
    base = base.with_workload(concurrency=None)
    kinds = _planned_kinds(base, cluster, engine, raises=promised is None)
    # The best plan's promise is the cluster's. Of plans with equal promises, the plan that allows a
    # request the fewest answers (``n``) comes first, so the order of nodes does not matter.
    plans = [planned.document for _, planned in kinds if planned.fits]
    plans = sorted(
        plans if promised is None else promised.plans, key=lambda plan: plan.promise.limits.n
    )
    best = max(plans, key=_order, default=None)
    found = {
        node.id: NodePlan(
            node=node.id, name=node.name, address=node.address, cards=_cards(node.machine),
            why_not=node.why_not or "it has no GPU that may be used",
        )
        for node in cluster.nodes
    }  # fmt: skip
    for nodes, planned in kinds:
        why, plan = planned.verdict.reason, None
        if best is not None and planned.plan is not None:
            why, plan = _kept(base, planned, best, engine)
        for node in nodes:
            assert node.machine is not None
            served = None if plan is None else on_machine(plan, node.machine)
            if served is not None and node is not nodes[0]:
                served = replace(served, considered=())
            found[node.id] = replace(found[node.id], plan=served, why_not=why)
    base = base.with_workload(concurrency=at_once)
    return _document(base, cluster, tuple(found.values()), kinds, whole=promised is None)


def _planned_kinds(base: ResolvedRequest, cluster: Cluster, engine: str, *, raises: bool) -> _Kinds:
    """Plan each kind of node once; return the nodes of each kind with their plan.

    Raises:
        TurbofitError: the first kind's error, if ``raises`` and no kind can be planned.
    """
    alike = grouped(
        (_planning_key(node.machine), (node.machine, node))
        for node in cluster.nodes
        if node.machine is not None and node.machine.visible and not node.why_not
    )
    kinds, errors = [], []
    for members in alike.values():
        machine = min((machine for machine, _ in members), key=_host_room)
        try:
            planned = plan_best(replace(base, machine=machine), engine)
        except TurbofitError as error:
            errors.append(error)
            planned = Planned(plan=None, verdict=Verdict(problem=error.message))
        kinds.append(([node for _, node in members], planned))
    if raises and errors and len(errors) == len(kinds):
        raise errors[0]
    return kinds


def _planning_key(machine: Machine) -> Hashable:
    """Return a key of a machine; machines with equal keys get the same plan."""
    learned = tuple(replace(calibration, when="") for calibration in machine.calibrations)
    alike = replace(
        machine, name="", source="", host=Host(), warnings=(), cuda=NA, calibrations=learned,
        gpus=tuple(replace(gpu, uuid="", holders=()) for gpu in machine.gpus),
        driver=machine.driver if learned else NA,
    )  # fmt: skip
    return alike, _host_room(machine) // _HOST_STEP


def _host_room(machine: Machine) -> int:
    """Return the available bytes of host memory; unknown memory counts as unlimited."""
    return known(machine.host.ram_available, maxsize)


def _cards(machine: Machine | None) -> str:
    """Return the visible cards in words; empty if nothing was measured."""
    return "" if machine is None else named_cards(map(machine.gpu, machine.visible))


def _order(plan: Plan) -> tuple[bool, int, int]:
    """Return a sort key of plans: LMDeploy or not, then the promised image limit and context."""
    return plan.backend.of_lmdeploy, plan.promise.image_limit or 0, plan.promise.context


def _kept(
    base: ResolvedRequest, planned: Planned, best: Plan, engine: str
) -> tuple[str, Plan | None]:
    """Plan a kind of node again with the promise of the ``best`` plan.

    Returns an empty text and the plan, or the reason why the kind does not keep the promise.
    """
    own = planned.document
    if own is best:
        return "", own
    if own.backend.of_lmdeploy != best.backend.of_lmdeploy:
        only = f"only {own.backend.name} serves on the node"
        return f"{only}, but the cluster runs {best.backend.name}", None
    try:
        again = plan_best(replace(base, machine=own.machine).keeping(best.promise), engine)
    except TurbofitError as error:
        return error.message, None
    if again.fits and again.document.backend.of_lmdeploy == best.backend.of_lmdeploy:
        return "", again.document
    broken = best.promise.why_broken(own.promise, own.model.image_rule) if own.fits else ""
    return broken or planned.verdict.reason or again.verdict.reason, None


def common_promise(plans: Sequence[Plan]) -> Promise | None:
    """Return the one promise of the serving nodes' plans, with the requests of all nodes.

    Returns None without plans.
    """
    if not plans:
        return None
    return replace(plans[0].promise, requests=sum(plan.promise.requests for plan in plans))


def _document(
    base: ResolvedRequest,
    cluster: Cluster,
    nodes: tuple[NodePlan, ...],
    kinds: _Kinds,
    *,
    whole: bool,
) -> ClusterPlan:
    """Make the cluster's plan from the plans of its nodes.

    ``whole``: these nodes are the whole cluster, so the plan fits only if these nodes run all
    concurrent requests.
    """
    plans = [node.plan for node in nodes if node.plan is not None]
    promise, asked = common_promise(plans), base.workload.concurrency or 0
    at_once = promise.requests if promise else 0
    fits = bool(plans) and (at_once >= asked or not whole)
    left = Counter(node.why_not for node in nodes if node.why_not).most_common()
    if plans and not fits:
        runs = counted(at_once, "request")
        why = f"{len(plans):,} of {counted(len(nodes), 'node')}: {runs} at once"
        causes = (f"--concurrency {asked}",)
        verdict = Verdict(subject=base.model.name, problem=why, causes=causes)
    else:
        verdict = _verdict(base.model.name, len(nodes), plans, left)
    return ClusterPlan(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=cluster.source,
        fits=fits,
        verdict=verdict.text,
        model=base.model,
        workload=replace(
            base.workload, context=base.workload.context or (promise.context if promise else None)
        ),
        promise=promise,
        nodes=nodes,
        warnings=tuple(_warnings(plans, left)),
        remedies=() if plans else tuple(_remedies(kinds)),
    )


def _verdict(
    name: str, nodes: int, plans: Sequence[Plan], left: Sequence[tuple[str, int]]
) -> Verdict:
    """Return what the serving nodes give together, or why no node serves."""
    all_nodes = counted(nodes, "node")
    if not plans:
        why = "; ".join(f"{counted(n, 'node')}: {text}" for text, n in left[:_MOST_CAUSES])
        why = why or "the cluster has no nodes"
        return Verdict(subject=f"{name} on none of {all_nodes}", problem=why)
    gpus = counted(sum(len(plan.ledgers) for plan in plans), "GPU")
    tokens = sum(plan.kv_tokens for plan in plans)
    found = (
        f"on {len(plans):,} of {all_nodes}, {gpus}: {tokens:,} KV tokens; a request of up to"
        f" {plans[0].promise.context:,} tokens may go to any node"
    )
    return Verdict(subject=name, found=found)


def _warnings(plans: Sequence[Plan], left: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Yield a draft's doubt, which nodes are left out and why, then the warnings of all plans."""
    yield from dict.fromkeys(text for plan in plans for text in draft_warnings(plan))
    for why, n in left if plans else ():
        yield f"{counted(n, 'node')} left out: {why}"
    runs = sorted({f"{it.backend} in {it.settings.dtype}" for plan in plans for it in plan.engines})
    if len(runs) > 1:
        yield f"nodes run {' and '.join(runs)}: the same request may be answered differently"
    texts = dict.fromkeys(text for plan in plans for text in plan.warnings)
    yield from (text for text in texts if not text.startswith("not used: "))


def _remedies(kinds: _Kinds) -> Iterator[Remedy]:
    """Yield for each kind of node the cheapest change that makes this kind serve."""
    for nodes, planned in kinds:
        for remedy in all_fitting(planned.plan)[:1]:
            where = f"{counted(len(nodes), 'node')} of {_cards(nodes[0].machine)}"
            yield replace(remedy, effect=f"{where}: {remedy.effect}")
