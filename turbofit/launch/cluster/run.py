"""One `turbofit serve --cluster` from its first look at the nodes to its end."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import Cluster
from turbofit.core.errors import DoesNotFitError, LaunchError, TurbofitError
from turbofit.core.process.files import write_atomic
from turbofit.core.struct import to_json
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.admin_commands import AdminCommands
from turbofit.launch.cluster.connect import connected
from turbofit.launch.cluster.controller import Controller
from turbofit.launch.cluster.coordinator import pin_coordinator
from turbofit.launch.cluster.node_state import NodeState
from turbofit.launch.cluster.nodes import held_only, tell_nodes
from turbofit.launch.cluster.places import Places
from turbofit.launch.cluster.promise import expected_routing_table
from turbofit.launch.cluster.replica import LAST_SECONDS
from turbofit.launch.cluster.tls import client_context
from turbofit.launch.serve.record import state_folder
from turbofit.planning.cluster import plan_cluster

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.core.cluster import ClusterPlan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.cluster.connect import RayConnection
    from turbofit.launch.cluster.coordinator import GatewayReport
    from turbofit.launch.serve.config import ClusterServeConfig
    from turbofit.launch.serve.supervisor import StopSignal

__all__ = ["serve_cluster"]

_TICK: Final = 0.2
_WRITE_SECONDS: Final = 1.0


def serve_cluster(
    config: ClusterServeConfig,
    stop: StopSignal,
    *,
    say: Callable[[str], None],
    on_open: Callable[[list[str]], None],
) -> signal.Signals:
    """Measure, plan, launch, and keep it until a signal ends it. Call it in the main thread.

    Args:
        config: what it was asked for.
        stop: tells of signals.
        say: takes lines of progress; a terminal that takes none costs the line, never the server.
        on_open: called with the public address once requests are answered.

    Raises:
        DoesNotFitError: no node can serve what is asked.
        LaunchError: nothing serves any more, or the name is taken.
        MachineError: Ray is not there, or not there any more.
        PackageError: Ray is not installed.
        UsageError: more gateways than the limits can be shared by.
    """

    def tell(text: str) -> None:
        with suppress(OSError, ValueError):
            say(text)

    with connected(config.address) as connection:
        stop.rearm()  # Ray takes SIGTERM
        places = Places()
        plan, node_states = _planned(config, connection, places, tell)
        name = config.name or plan.model.name
        coordinator = pin_coordinator(name, connection.here)
        folder = state_folder("clusters", plan.model.name)
        write_atomic(folder / "cluster-plan.json", plan.to_json(), mode=0o600)
        controller = Controller(connection, places, plan, node_states, config, tell, name=name)
        controller.gateways = config.gateways
        stop.abrupt = False
        try:
            return _Run(config, controller, coordinator, folder, tell, on_open).follow(stop)
        finally:
            stop.abrupt = stop.signal is None


def _planned(
    config: ClusterServeConfig,
    connection: RayConnection,
    places: Places,
    say: Callable[[str], None],
) -> tuple[ClusterPlan, list[NodeState]]:
    """Take what is free, measure it, and plan for it.

    Raises:
        DoesNotFitError: no node can serve.
    """
    alive = connection.alive()
    say(f"{len(alive)} nodes of Ray at {connection.address}: taking their free GPUs")
    places.take([node.id for node in alive.values() if node.gpus and not node.leaving])
    told = tell_nodes(alive.values(), pretend=config.pretend)
    nodes = tuple(held_only(node, places.on(node.id)) for node in told)
    cluster = Cluster(source=f"ray {connection.address}", nodes=nodes)
    plan = plan_cluster(config.request, cluster)
    say(plan.verdict)
    for warning in plan.warnings:
        say(f"warning: {warning}")
    if not plan.fits:
        first = plan.remedies[0] if plan.remedies else None
        hint = f"{first.change}: {first.effect}" if first else "see turbofit plan --cluster"
        raise DoesNotFitError(plan.verdict, hint=hint)
    if plan.spans:
        raise DoesNotFitError(
            f"no node holds {plan.model.name} alone, and engines over several nodes are not "
            "supervised",
            hint="turbofit plan --cluster prints the command of each node, to be run by hand",
        )
    from turbofit.gateway.routing.fleet_updater import check_gateways

    check_gateways(expected_routing_table(plan, config.gateways))
    return plan, [NodeState(node) for node in nodes if alive[node.id].gpus]


class _Run:
    """The gateway here, the controller, and the coordinator, until the end."""

    def __init__(
        self,
        serve_config: ClusterServeConfig,
        controller: Controller,
        coordinator: Any,
        folder: Path,
        say: Callable[[str], None],
        on_open: Callable[[list[str]], None],
    ) -> None:
        self._serve_config, self._say, self._on_open = serve_config, say, on_open
        self._controller, self._coordinator, self._folder = controller, coordinator, folder
        self._admin_commands = AdminCommands(controller, coordinator.answer.remote)
        self._config = self._settled()
        #: What other gateways need of it: the plan's part, and none of the clients' keys.
        self._shared = GatewayConfig(
            prefix_affinity=self._config.prefix_affinity,
            serial=self._config.serial,
            pretend=self._config.pretend,
            names=self._config.names,
        )
        self._front: GatewayThread[Gateway] | None = None
        #: The routing tables that the gateway here, and the coordinator, were given last, and the
        #: one that the coordinator was last heard to hold.
        self._told, self._posted, self._held = 0, -1, -1
        self._wrote = float("-inf")
        self._inbox: Any = None
        self._others: dict[str, GatewayReport] = {}
        self._opened = False

    def follow(self, stop: StopSignal) -> signal.Signals:
        """Until a signal comes, or nothing is left to serve with."""
        controller = self._controller
        failed = True
        try:
            self._front = self._gateway()
            controller.begin()
            while stop.signal is None:
                controller.tick(_TICK)
                self._publish()
                if time.monotonic() - self._wrote >= _WRITE_SECONDS:
                    self._wrote = time.monotonic()
                    self._exchange()
                self._admin_commands.tick()
            failed = False
            return stop.signal
        finally:
            self._end(stop, failed=failed)

    def _settled(self) -> GatewayConfig:
        """The gateway's settings, with what the plan decides."""
        plans = [node.plan for node in self._controller.plan.nodes if node.plan is not None]
        assert self._serve_config.gateway is not None
        return replace(
            self._serve_config.gateway,
            prefix_affinity=any(plan.settings.enable_prefix_caching for plan in plans),
            serial=any(plan.engine.serial for plan in plans),
            drain_seconds=self._serve_config.timing.drain,
            pretend=self._serve_config.pretend,
            names=self._serve_config.names(plans[0]) if plans else {},
        )

    def _gateway(self) -> GatewayThread[Gateway]:
        from turbofit.gateway.http.accesslog import access_log
        from turbofit.gateway.server import make_routing_table_gateway
        from turbofit.gateway.thread import GatewayThread

        log = access_log(self._serve_config.access_log or str(self._folder / "access.log"))
        tls = client_context(os.environ)
        routing_table = self._controller.routing_table()
        front = GatewayThread(
            make_routing_table_gateway(routing_table, self._config, log=log, tls=tls)
        )
        front.start()
        return front

    def _publish(self) -> None:
        """Tell the gateway here what has changed."""
        front, routing_table = self._front, self._controller.routing_table()
        assert front is not None
        if routing_table.number != self._told:
            try:
                front.call(lambda gateway: gateway.follow(routing_table))
            except LaunchError:
                if not front.alive:
                    raise
                return  # it is busy: it is told at the next look
            self._told = routing_table.number
        if not self._opened and any(not member.draining for member in routing_table.members):
            self._opened = True
            self._on_open([front.url])

    def _exchange(self) -> None:
        """Ask the gateways, write the coordinator, take what is asked."""
        front, controller = self._front, self._controller
        assert front is not None
        try:
            outstanding, up = front.call(lambda gateway: (gateway.outstanding(), gateway.health()))
        except LaunchError:
            if not front.alive:
                raise
            return
        # A gateway that has just come counts at once: it may send to engines that are to end.
        heard = self._hear()
        tellers = [outstanding, *(seen.outstanding for seen in self._others.values())]
        names = {name for told in tellers for name in told}
        controller.outstanding = {
            name: sum(told.get(name, 0) for told in tellers) for name in names
        }
        controller.up = up
        followed = [self._told, *(seen.number for seen in self._others.values())]
        if self._serve_config.gateways > 1:
            followed.append(self._held)  # a gateway that comes now is told that one
        controller.followed = min(followed)
        if heard:
            self._write(front.url)

    def _hear(self) -> bool:
        """Take what the coordinator has answered; False where it has not answered yet.

        Raises:
            LaunchError: it is gone for good.
        """
        if self._inbox is None:
            return True
        inbox = None
        try:
            inbox = ray_adapter.result(self._inbox, 0)
        except ray_adapter.ResultTimeoutError:
            return False
        except ray_adapter.ActorDiedError as exc:
            raise LaunchError(
                f"the coordinator of {self._controller.name} is gone: {ray_adapter.one_line(exc)}",
                hint="see ray status and this node's ray logs",
            ) from None
        except ray_adapter.RayCallError:
            pass  # Ray starts it again
        if inbox is None or inbox.routing_table != self._posted:
            self._posted = -1  # it knows nothing yet: what there is is written anew
        if inbox is not None:
            self._held = inbox.routing_table
            others = self._others if self._posted < 0 else inbox.gateways
            self._take(inbox.questions, others)
        return True

    def _write(self, url: str) -> None:
        """Tell the coordinator, and whoever reads the run's folder, what there is."""
        controller = self._controller
        status = controller.status((url, *(seen.url for seen in self._others.values())))
        with suppress(TurbofitError, OSError):  # a full disk costs the file
            write_atomic(self._folder / "cluster-status.json", to_json(status), mode=0o600)
        places = self._serve_config.gateways - 1
        routing_table = controller.routing_table()
        fresh = routing_table if routing_table.number != self._posted else None
        self._inbox = self._coordinator.write.remote(
            status, fresh, self._shared, places, self._others
        )
        self._posted = routing_table.number

    def _take(
        self, questions: tuple[tuple[int, dict[str, Any]], ...], others: dict[str, GatewayReport]
    ) -> None:
        for number, document in questions:
            self._admin_commands.take(number, document)
        if set(others) != set(self._others):
            here = self._controller.connection.here_address
            self._controller.let(
                tuple(dict.fromkeys((here, *(s.address for s in others.values()))))
            )
            self._controller.say(f"{1 + len(others)} gateways")
        self._others = others

    def _end(self, stop: StopSignal, *, failed: bool) -> None:
        """Drain, stop, and leave nothing."""
        urgent = failed or stop.urgent
        if self._front is not None:
            stop.on_second(self._front.strike)
            if not urgent:
                self._say("draining: what is under way may end")
            self._front.stop(drain=not urgent)
        if stop.signal is not None:
            self._say(f"stopping: {stop.signal.name}")
        seconds = self._serve_config.timing.drain + LAST_SECONDS
        with suppress(Exception):  # Ray may be gone: what was there is gone with it
            self._controller.stop(seconds, lambda: urgent or stop.urgent)
