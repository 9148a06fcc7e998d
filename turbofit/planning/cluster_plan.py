"""Plans a cluster: one plan for each kind of node, and one promise that all nodes keep.

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
from turbofit.core.machine import Host, Machine
from turbofit.core.messages import plural
from turbofit.core.plan import EnginePlan, Limits, Plan, Remedy
from turbofit.core.struct import NA, known
from turbofit.core.units import GIB, grouped
from turbofit.core.version import __version__
from turbofit.planning.choose import plan_best
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
    if promised is not None and promised.limits is not None:
        if base.image_limit is None and base.workload.image_size is None:
            base = replace(base, image_limit=promised.limits.image_limit)
        if not base.context_given:
            base = base.with_workload(context=promised.longest_request_tokens)
    kinds = _planned_kinds(base, cluster, engine, raises=promised is None)
    # The best plan's promise is the cluster's. Of plans with equal promises, the plan that allows a
    # request the fewest answers (``n``) comes first, so the order of nodes does not matter.
    plans = [planned.document for _, planned in kinds if planned.fits]
    plans = sorted(
        plans if promised is None else promised.plans, key=lambda plan: plan.promise.limits.n
    )
    best = max(plans, key=_promise, default=None)
    found = {
        node.id: NodePlan(
            node=node.id, name=node.name, address=node.address, cards=_cards(node.machine),
            why_not=node.why_not or "it has no GPU that may be used",
        )
        for node in cluster.nodes
    }  # fmt: skip
    for nodes, planned in kinds:
        why, plan = planned.verdict.reason, None
        if best is not None and not why:
            why, plan = _why_broken(planned.document, best), planned.document
        for node in nodes:
            served = (
                None
                if plan is None or best is None or why
                else _plan_of_node(node, plan, best.promise.limits)
            )
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
    visible = () if machine is None else machine.visible
    names = Counter(machine.gpu(index).name for index in visible if machine is not None)
    return " + ".join(f"{n}x {name}" for name, n in names.items())


def _promise(plan: Plan) -> tuple[bool, int, int]:
    """Return a plan's promise as a sort key: LMDeploy or not, then image limit, then context."""
    image_limit = plan.promise.limits.image_limit or 0
    return plan.backend.of_lmdeploy, image_limit, plan.promise.context


def _why_broken(plan: Plan, best: Plan) -> str:
    """Return the reason why a plan does not keep the promise of the best plan; empty if it does."""
    of_lmdeploy, image_limit, held = _promise(plan)
    on_lmdeploy, promised_limit, promised_context = _promise(best)
    rule = plan.model.image_rule
    if of_lmdeploy != on_lmdeploy:
        return (
            f"only {plan.backend.name} serves on the node, but the cluster runs {best.backend.name}"
        )
    if rule is not None and image_limit < promised_limit:
        unit = rule.limit_unit
        return f"serves images of {image_limit:,} {unit} at most, {promised_limit:,} are promised"
    if held < promised_context:
        return f"holds {held:,} tokens under the promised images, {promised_context:,} are promised"
    return ""


def _plan_of_node(node: Node, plan: Plan, limits: Limits) -> Plan:
    """Return the plan of a kind of node for one node of this kind.

    The plan gets the node's machine and GPU ids, and the promised ``limits``. These may allow a
    request more answers (``n``) than the batch of the node's engine: the other answers wait in the
    engine, and take no memory.
    """
    machine = node.machine
    assert machine is not None
    promise = replace(
        plan.promise,
        limits=limits,
        images=limits.images_per_request,
        image_limit=limits.image_limit,
    )
    engines = tuple(_engine_on(machine, engine) for engine in plan.engines)
    return replace(plan, machine=machine, engines=engines, promise=promise)


def _engine_on(machine: Machine, engine: EnginePlan) -> EnginePlan:
    """Return the engine of a plan with the GPU ids of a machine."""
    ledgers = (replace(it, uuid=machine.gpu(it.index).uuid) for it in engine.ledgers)
    return replace(engine, ledgers=tuple(ledgers))


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
    at_once, asked = sum(plan.promise.requests for plan in plans), base.workload.concurrency or 0
    fits = bool(plans) and (at_once >= asked or not whole)
    longest = plans[0].promise.context if plans else 0
    left = Counter(node.why_not for node in nodes if node.why_not).most_common()
    if plans and not fits:
        why = f"{len(plans):,} of {_count(len(nodes), 'node')} run {at_once:,} requests at once"
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
        workload=replace(base.workload, context=base.workload.context or longest or None),
        limits=plans[0].promise.limits if plans else None,
        longest_request_tokens=longest,
        nodes=nodes,
        warnings=tuple(_warnings(plans, left)),
        remedies=() if plans else tuple(_remedies(kinds)),
    )


def _verdict(
    name: str, nodes: int, plans: Sequence[Plan], left: Sequence[tuple[str, int]]
) -> Verdict:
    """Return what the serving nodes give together, or why no node serves."""
    all_nodes = _count(nodes, "node")
    if not plans:
        why = "; ".join(f"{_count(n, 'node')}: {text}" for text, n in left[:_MOST_CAUSES])
        why = why or "the cluster has no nodes"
        return Verdict(subject=f"{name} on none of {all_nodes}", problem=why)
    gpus = _count(sum(len(plan.ledgers) for plan in plans), "GPU")
    tokens = sum(plan.kv_tokens for plan in plans)
    found = (
        f"on {len(plans):,} of {all_nodes}, {gpus}: {tokens:,} KV tokens; a request of up to"
        f" {plans[0].promise.context:,} tokens may go to any node"
    )
    return Verdict(subject=name, found=found)


def _warnings(plans: Sequence[Plan], left: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Yield which nodes are left out and why, then the warnings of all plans."""
    for why, n in left if plans else ():
        yield f"{_count(n, 'node')} left out: {why}"
    runs = sorted({f"{plan.backend.name} in {plan.engines[0].settings.dtype}" for plan in plans})
    if len(runs) > 1:
        yield f"nodes run {' and '.join(runs)}: the same request may be answered differently"
    texts = dict.fromkeys(text for plan in plans for text in plan.warnings)
    yield from (text for text in texts if not text.startswith("not used: "))


def _remedies(kinds: _Kinds) -> Iterator[Remedy]:
    """Yield for each kind of node the cheapest change that makes this kind serve."""
    for nodes, planned in kinds:
        for remedy in all_fitting(planned.plan)[:1]:
            where = f"{_count(len(nodes), 'node')} of {_cards(nodes[0].machine)}"
            yield replace(remedy, effect=f"{where}: {remedy.effect}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {plural(number, noun)}"
