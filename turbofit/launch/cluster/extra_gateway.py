"""One more gateway in front of a cluster that serves, on any node, behind the user's load balancer.

The coordinator tells it which engines there are; it tells how many requests it has at each.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from msgspec.structs import replace

from turbofit.core.errors import LaunchError, UsageError
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.connect import connected
from turbofit.launch.cluster.coordinator import GatewayReport, heard, one_coordinator
from turbofit.launch.cluster.tls import client_context

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.accesslog import Log
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.cluster.coordinator import GatewayUpdate
    from turbofit.launch.serve.supervisor import StopSignal

__all__ = ["run_extra_gateway"]

_TICK: Final = 0.2
_SECONDS: Final = 1.0
#: Seconds of silence after which a coordinator counts as abandoned.
_SILENT: Final = 15.0


def run_extra_gateway(
    address: str | None,
    name: str | None,
    config: GatewayConfig,
    log: Log | None,
    stop: StopSignal,
    on_ready: Callable[[str], None],
) -> signal.Signals:
    """Serve until a signal, or until what is behind it ends. Call it in the main thread.

    Args:
        address: Ray's, None for the cluster of this host.
        name: what is served; None where there is only one.
        config: the public side; what the plan decides is told by the coordinator.
        log: takes a record of each request.
        stop: tells of signals.
        on_ready: told the gateway's own address.

    Raises:
        LaunchError: the address cannot be bound, or what was served has ended.
        MachineError: no Ray cluster answers.
        UsageError: nothing is served, or as many gateways are there as were planned for.
    """
    with connected(address) as connection:
        stop.rearm()  # Ray takes SIGTERM
        coordinator = one_coordinator(name, "turbofit serve MODEL --cluster ray --gateways 2")
        gateway = _Attending(coordinator, connection.here_address, config, log)
        stop.abrupt = False
        try:
            gateway.open()
            stop.on_second(gateway.strike)
            on_ready(gateway.url)
            while stop.signal is None:
                gateway.tick()
                time.sleep(_TICK)
            return stop.signal
        finally:
            gateway.close(drain=stop.signal is not None and not stop.urgent)
            stop.abrupt = stop.signal is None


class _Attending:
    """A gateway, and its place at the coordinator."""

    def __init__(
        self, coordinator: Any, address: str, config: GatewayConfig, log: Log | None
    ) -> None:
        self._coordinator, self._address, self._config, self._log = (
            coordinator,
            address,
            config,
            log,
        )
        self._name = uuid4().hex
        self._front: GatewayThread[Gateway] | None = None
        self._told = -1
        self._pending: Any = None
        self._heard = time.monotonic()
        self.url = ""

    def open(self) -> None:
        """Take a place, and listen.

        Raises:
            LaunchError: the address cannot be bound.
            UsageError: there is no place left.
        """
        from turbofit.gateway.server import make_routing_table_gateway
        from turbofit.gateway.thread import GatewayThread

        told: GatewayUpdate = heard(self._poll(GatewayReport(address=self._address)), _SILENT)
        _check(told)
        if told.routing_table is None or told.config is None:
            raise LaunchError("it is not served yet", hint="wait until turbofit serve has begun")
        config = replace(
            self._config,
            prefix_affinity=told.config.prefix_affinity,
            serial=told.config.serial,
            pretend=told.config.pretend,
            names=told.config.names,
        )
        tls = client_context(os.environ)
        gateway = make_routing_table_gateway(told.routing_table, config, log=self._log, tls=tls)
        self._front = GatewayThread(gateway)
        self._front.start()
        self._told, self.url = told.routing_table.number, self._front.url

    def tick(self) -> None:
        """Follow what the coordinator tells, and tell it what there is.

        Raises:
            LaunchError: what was served has ended.
            UsageError: others have taken the place meanwhile.
        """
        front = self._front
        assert front is not None
        if self._pending is None:
            outstanding, up = front.call(lambda gateway: (gateway.outstanding(), gateway.health()))
            seen = GatewayReport(
                address=self._address, url=self.url, number=self._told,
                outstanding=outstanding, up=up,
            )  # fmt: skip
            self._pending = self._poll(seen)
            return
        try:
            told: GatewayUpdate = ray_adapter.result(self._pending, 0)
        except ray_adapter.ActorDiedError:
            raise _ended() from None
        except ray_adapter.RayCallError as exc:
            if not isinstance(exc, ray_adapter.ResultTimeoutError):
                self._pending = None  # Ray starts the coordinator again
            if time.monotonic() - self._heard > _SILENT:
                raise _ended() from None
            return
        self._pending, self._heard = None, time.monotonic()
        _check(told)
        routing_table = told.routing_table
        if routing_table is not None and routing_table.number != self._told:
            front.call(lambda gateway: gateway.follow(routing_table))
            self._told = routing_table.number

    def close(self, *, drain: bool) -> None:
        """End what is under way, in order or at once, and give the place back.

        Until then the gateway goes on to follow and to tell: the coordinator forgets one that is
        silent, and engines end under its requests.
        """
        if self._front is not None:
            ending = threading.Thread(
                target=partial(self._front.stop, drain=drain), name="drain", daemon=True
            )
            ending.start()
            ending.join(_TICK)
            while ending.is_alive():
                with suppress(Exception):  # whatever it is, requests that are under way may end
                    self.tick()
                ending.join(_TICK)
        with suppress(Exception):  # the coordinator may be gone: so is the place
            self._coordinator.leave.remote(self._name)

    def strike(self) -> None:
        """Break off a drain; safe in a signal handler, since it takes no lock."""
        if self._front is not None:
            self._front.strike()

    def _poll(self, seen: GatewayReport) -> Any:
        return self._coordinator.poll.remote(self._name, seen, self._told, _SECONDS)


def _check(told: GatewayUpdate) -> None:
    if told.refused:
        raise UsageError(
            told.refused, hint="serve with a larger --gateways: each takes its part of the limits"
        )


def _ended() -> LaunchError:
    return LaunchError("what was served has ended", hint="start turbofit serve --cluster again")
