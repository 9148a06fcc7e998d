"""Each kind of node planned by itself, freely or under a promise, and each such plan only once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.errors import TurbofitError
from turbofit.core.images import ImageRule
from turbofit.core.plan import Plan
from turbofit.core.struct import Struct
from turbofit.tuner.choose import best_plan
from turbofit.tuner.cluster.kinds import Kind
from turbofit.tuner.cluster.rebase import Rebase
from turbofit.tuner.cluster.speeds import ALMOST, NodeSpeed
from turbofit.tuner.resolved_request import ResolvedRequest, vision_load_of
from turbofit.tuner.search.share import held_shares

__all__ = ["KindPlan", "KindPlanner", "Promise"]


class Promise(Struct):
    """What clients are told: image limit (tiles or pixels) and context; None: as each node can."""

    limit: int | None = None
    context: int | None = None


class KindPlan(Struct):
    """A kind's plan, or the error that there is none; ``why_not`` is empty where it serves."""

    plan: Plan | None
    why_not: str
    error: str = ""

    @property
    def serves(self) -> Plan:
        """The plan of a kind that serves."""
        assert self.plan is not None
        return self.plan


class KindPlanner:
    """The kinds of one cluster, and what was planned for them.

    Args:
        base: what was asked; its machine is not read.
        kinds: of the nodes.
        engine: as for :func:`best_plan`.
    """

    def __init__(self, base: ResolvedRequest, kinds: Sequence[Kind], engine: str) -> None:
        self.base, self.kinds, self.engine = base, tuple(kinds), engine
        self.requested_load = vision_load_of(base, base.requested_limit)
        self.kind_of = {node.id: k for k, kind in enumerate(self.kinds) for node in kind.nodes}
        self.errors: list[TurbofitError] = []
        self._made: dict[tuple[int, int | None, Promise], KindPlan] = {}
        self._speeds: dict[int, tuple[Plan, NodeSpeed]] = {}

    @property
    def rule(self) -> ImageRule:
        """The rule of a model that takes images."""
        assert self.base.model.image_rule is not None
        return self.base.model.image_rule

    @property
    def limit_free(self) -> bool:
        """Whether an image limit may be lowered."""
        return self.base.fixed_limit is None and self.base.workload.image_size is None

    def shares(
        self,
        members: Sequence[int],
        shared: Callable[[Sequence[float]], list[float]],
        promise: Promise | None = None,
    ) -> dict[int, float]:
        """Requests of one node of each kind, of which its caches hold all where it serves at all.

        Args:
            members: the kinds.
            shared: shares the requests out, given the most for a node of each kind.
            promise: as for :meth:`plan`.
        """

        def held(place: int, share: float) -> float:
            tried = self.plan(members[place], share, promise)
            held = UNSET if tried.plan is None else tried.plan.held
            if not tried.why_not or held is UNSET or not held.requests:
                return share
            return float(held.requests)

        return dict(zip(members, held_shares(shared, held, len(members)), strict=True))

    def at_once(self, shares: Mapping[int, float]) -> float:
        """Requests over all nodes of some kinds with these shares."""
        return sum(share * len(self.kinds[k].nodes) for k, share in shares.items())

    def holds_all(self, shares: Mapping[int, float]) -> bool:
        """Whether these shares are all the requests that are asked for."""
        return self.at_once(shares) >= (self.base.workload.concurrency or 0) * (1 - ALMOST)

    def plan(self, number: int, share: float, promise: Promise | None = None) -> KindPlan:
        """One kind with a share of the requests; what it does alone where that is the promise."""
        requests = self._requests(share)
        alone = self._once(number, requests, Promise())
        if promise is None or (alone.plan is not None and _meets(alone.plan, promise)):
            return alone
        return self._once(number, requests, promise)

    def _requests(self, share: float) -> int | None:
        """A share in whole requests; None where each node chooses its batch."""
        return None if self.base.workload.concurrency is None else max(1, ceil(share - ALMOST))

    def request(self, number: int, requests: int | None, promise: Promise) -> ResolvedRequest:
        """What is asked of one kind."""
        return self.ask_of(self.kinds[number].nodes[0], requests, promise, number)

    def ask_of(
        self, node: Node, requests: int | None, promise: Promise, number: int | None
    ) -> ResolvedRequest:
        """What is asked of one node, or of the kind of this number."""
        base = self.base
        machine = node.machine if number is None else self.kinds[number].machine
        assert machine is not None
        workload = replace(base.workload, concurrency=requests)
        if promise.context is not None and not self.base.context_given:
            workload = replace(workload, context=promise.context)
        request = replace(base, machine=machine, workload=workload)
        if promise.limit is None or not self.limit_free:
            return request
        return request.with_limit(promise.limit)

    def on_nodes(self, number: int, share: float, promise: Promise) -> list[KindPlan]:
        """The kind's plan on each of its nodes; it serves on the kind's machine."""
        requests = self._requests(share)
        tried = self.plan(number, share, promise)
        rebase = Rebase(self.request(number, requests, promise), tried.serves)
        found = []
        for node in self.kinds[number].nodes:
            plan = rebase.on(node)
            if plan is None:  # not the same settings: by itself
                found.append(self._tried(self.ask_of(node, requests, promise, None)))
            else:
                found.append(KindPlan(plan=plan, why_not=""))
        return found

    def speed(self, plan: Plan) -> NodeSpeed:
        """The forecast of a node that runs this plan."""
        if id(plan) not in self._speeds:
            fixed = "max_batch_size" in self.base.fixed
            self._speeds[id(plan)] = (plan, NodeSpeed(plan, self.requested_load, fixed_batch=fixed))
        return self._speeds[id(plan)][1]

    def _once(self, number: int, requests: int | None, promise: Promise) -> KindPlan:
        key = (number, requests, promise)
        if key not in self._made:
            self._made[key] = self._tried(self.request(number, requests, promise))
        return self._made[key]

    def _tried(self, request: ResolvedRequest) -> KindPlan:
        try:
            plan = best_plan(request, self.engine)
        except TurbofitError as error:
            self.errors.append(error)
            return KindPlan(plan=None, why_not=error.message)
        said = plan.verdict.removeprefix("does not fit: ").removeprefix(f"{plan.model.name}: ")
        return KindPlan(plan=self._promised(plan, request), why_not="" if plan.fits else said)

    def _promised(self, plan: Plan, request: ResolvedRequest) -> Plan:
        """The plan with the promise as the reason of what it fixed."""
        base, swaps = self.base, {}
        if request.workload.context is not None and base.workload.context is None:
            positions = base.model.text.max_position_embeddings
            swaps["session_len"] = (
                f"what every node holds of the model's {positions}, promised for all"
            )
        for name in ("max_dynamic_patch", "max_pixels"):
            if getattr(request, name) is not None and getattr(base, name) is None:
                limit = getattr(request, name)
                lowered = f"promised for all nodes; the model's own is {base.requested_limit}"
                swaps[name] = "the model's own" if limit == base.requested_limit else lowered
        return replace(plan, reasons=tuple(_swapped(line, swaps) for line in plan.reasons))


def _swapped(line: str, swaps: dict[str, str]) -> str:
    head, _, _ = line.partition(": ")
    why = swaps.get(head.split(" ", 1)[0])
    return line if why is None else f"{head}: {why}"


def _meets(plan: Plan, promise: Promise) -> bool:
    """Whether a plan that was made without the promise already keeps exactly the promise."""
    if not plan.fits:
        return False
    limit = promise.limit is None or plan.limits.image_limit == promise.limit
    context = promise.context is None or plan.kv.longest_request_tokens == promise.context
    return limit and context
