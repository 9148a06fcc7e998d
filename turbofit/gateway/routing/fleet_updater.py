"""From what a gateway was told to the engines it has."""

from __future__ import annotations

from random import random
from typing import TYPE_CHECKING

from turbofit.core.errors import UsageError
from turbofit.gateway.config import host_of_one
from turbofit.gateway.limits.gate import Gate
from turbofit.gateway.routing.engines import RoutedEngine

if TYPE_CHECKING:
    from turbofit.gateway.limits.request_limits import Bounds
    from turbofit.gateway.routing.fleet import Fleet
    from turbofit.gateway.routing.routing_table import Member, RoutingTable

__all__ = ["FleetUpdater", "check_gateways"]


def check_gateways(routing_table: RoutingTable) -> None:
    """Refuse more gateways than one request leaves room for.

    Each takes its part of an engine's gate and host memory, and that part must hold a request at
    its limits: one that the bounds admit could otherwise never pass.

    Raises:
        UsageError: with how many are possible.
    """
    if routing_table.gateways < 1:
        raise UsageError(
            f"{routing_table.gateways} gateways serve nobody", hint="at least 1 is needed"
        )
    if routing_table.bounds.rule is None:
        return
    units, host = routing_table.bounds.limits.units_per_request, host_of_one(routing_table.bounds)
    for member in routing_table.members:
        if member.draining:
            continue
        parts = [(member.host_bytes // host, f"{member.host_bytes} bytes of host memory", host)]
        if member.gate is not None:
            parts.append((member.gate // max(1, units), f"{member.gate} vision units", units))
        most, what, one = min(parts)
        if routing_table.gateways > most:
            raise UsageError(
                f"{routing_table.gateways} gateways share {what} in flight to engine"
                f" {member.name}, and one request may take {one} of them",
                hint=f"at most {most} gateway{'s' * (most != 1)} can share it"
                if most
                else "plan for smaller requests",
            )


class FleetUpdater:
    """Applies routing tables to a fleet; the same name stays the same engine.

    Args:
        fleet: whose engines they become.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._index = max((engine.index for engine in fleet), default=-1) + 1
        self._number: int | None = None
        self._bounds: Bounds | None = None

    def apply(self, routing_table: RoutingTable) -> tuple[RoutedEngine, ...] | None:
        """Make the fleet what the routing table says.

        Returns:
            Engines whose requests must end: those that went, and those that are another process
            now, at another address. None where this routing table, or a newer one, is in force.
        """
        if self._number is not None and routing_table.number <= self._number:
            return None
        self._number = self._fleet.routing_table = routing_table.number
        if routing_table.bounds != self._bounds:
            self._bounds = routing_table.bounds
            self._fleet.turns.append(routing_table.number)
        known = {engine.name: engine for engine in self._fleet}
        engines: list[RoutedEngine] = []
        ended: list[RoutedEngine] = []
        for member in {member.name: member for member in routing_table.members}.values():
            engine = known.pop(member.name, None)
            if engine is None:
                engine = RoutedEngine(self._index, member.url, name=member.name)
                engine.since = routing_table.number
                if routing_table.gateways > 1:
                    # LMDeploy's proxy looks at its engines in a random order: several gateways
                    # that know nothing of each other must not begin with the same engine.
                    engine.turn = random()
                self._index += 1
            elif engine.url != member.url.rstrip("/"):
                ended.append(engine)
                _begin_anew(engine, member.url)
                engine.since = routing_table.number
            elif not engine.up:
                engine.last_check = float("-inf")  # whoever wrote the routing table may know better
            engine.share, engine.key = member.share, member.key
            _limit(engine, member, routing_table)
            engine.host_limit = member.host_bytes // routing_table.gateways
            engine.draining = member.draining
            engines.append(engine)
        self._fleet.set(engines)
        return (*ended, *known.values())


def _limit(engine: RoutedEngine, member: Member, routing_table: RoutingTable) -> None:
    """Hold an engine to this gateway's part of its gate and its cache."""
    gateways = routing_table.gateways
    units = None if member.gate is None else member.gate // gateways
    kv = member.kv.shared(gateways, routing_table.bounds.limits.n)
    if engine.gate is not None:
        engine.gate.limit(units, kv)
    elif units is not None:
        engine.gate = Gate(units, kv)


def _begin_anew(engine: RoutedEngine, url: str) -> None:
    """It was started again elsewhere: nothing is known of it but its name."""
    engine.url, engine.model = url.rstrip("/"), None
    engine.failures, engine.suspect, engine.up = 0, True, True
    engine.last_success = engine.last_check = float("-inf")
