"""A kind's plan on one of its members: the same settings, the member's own cards and bytes.

The kind was planned for cards at least as full, so that the member's cache is as large or larger
and as much or more stays free.
"""

from __future__ import annotations

from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.machine import Machine
from turbofit.core.plan import Plan
from turbofit.core.struct import known
from turbofit.memory.engines import engine_named
from turbofit.memory.start_outcome import outcome_at
from turbofit.memory.vision_load import vision_load_within
from turbofit.tuner.explain.plan_document import document, requests_held, verdict_of
from turbofit.tuner.resolved_request import ResolvedRequest, accounts_of, host_of, host_problem

__all__ = ["Rebase"]


class Rebase:
    """One kind's plan, for its members. Equally full ones are accounted for once.

    Args:
        request: what the kind was planned for.
        plan: what came out, and fits.
    """

    def __init__(self, request: ResolvedRequest, plan: Plan) -> None:
        self._ask, self._plan = request, plan
        self._plans: dict[tuple[object, ...], Plan | None] = {_fullness(plan.machine): plan}

    def on(self, node: Node) -> Plan | None:
        """The plan with the node's own machine, without the command lines.

        None where it does not fit after all, which only a member that is fuller than the kind has.
        Also for a member that is freer: of the fallback engine, whose layers lie where memory is,
        and where the least is asked for, since the same ratio takes more there.
        """
        machine = node.machine
        assert machine is not None
        key = _fullness(machine)
        if key not in self._plans:
            self._plans[key] = self._accounted(machine)
        plan = self._plans[key]
        return None if plan is None else _renamed(plan, machine)

    def _accounted(self, machine: Machine) -> Plan | None:
        plan = self._plan
        if plan.engine.serial or self._ask.least:
            return None
        request, engine = replace(self._ask, machine=machine), engine_named(plan.engine.name)
        groups, limits = plan.parallel.groups, plan.limits
        settings = [one.settings for one in plan.by_group] or [plan.settings] * len(groups)
        vision_load = vision_load_within(limits)
        forward = replace(vision_load, units_per_forward=limits.units_per_forward)
        accounts = accounts_of(request, settings, groups, forward, engine)
        ratios = [one.settings.cache_max_entry_count for one in accounts]
        pairs = list(zip(accounts, ratios, strict=True))
        host = host_of(request, accounts, engine)
        if host_problem(host) is not None:
            return None
        if not all(outcome_at(account, ratio).kind == "serves" for account, ratio in pairs):
            return None
        tokens = [account.tokens_at(ratio) for account, ratio in pairs]
        if not plan.by_group:
            tokens = [min(tokens)] * len(tokens)
        held = requests_held(accounts, tokens, vision_load)
        made = document(
            request,
            engine,
            accounts,
            fits=True,
            verdict=verdict_of(request, groups, accounts, tokens, vision_load),
            parallel_reason=plan.parallel.reason,
            host=host,
            settings=plan.settings,
            vision_load=forward,
            limit=limits.image_limit,
            held=None if request.promised_requests is None else held,
            at_once=[one.at_once for one in plan.by_group],
        )
        return replace(
            plan, verdict=made.verdict, kv=made.kv, gpus=made.gpus, host=made.host,
            limits=made.limits, by_group=made.by_group, held=made.held,
        )  # fmt: skip


def _renamed(plan: Plan, machine: Machine) -> Plan:
    """The same bytes under the machine's own names."""
    uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
    return replace(
        plan,
        machine=machine,
        gpus=tuple(replace(ledger, uuid=uuids[ledger.index]) for ledger in plan.gpus),
    )


def _fullness(machine: Machine) -> tuple[object, ...]:
    """What differs between members of a kind."""
    used = tuple(known(machine.gpu(index).used, 0) for index in machine.visible)
    return (*used, machine.host.ram_available)
