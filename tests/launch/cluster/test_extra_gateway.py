"""One more gateway that ends: what it follows and tells while its requests end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from tests.launch.cluster.test_coordinator import status
from tests.launch.cluster.test_promise import planned
from tests.waiting import until
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.routing.routing_table import RoutingTable
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.coordinator import Coordinator
from turbofit.launch.cluster.extra_gateway import _Attending
from turbofit.launch.cluster.promise import expected_routing_table


class Front:
    """In place of `GatewayThread`: its drain ends when the test says so."""

    def __init__(self) -> None:
        self.drains, self.may_end = threading.Event(), threading.Event()
        self.busy = {"a/0": 1}
        self.follows = -1

    def outstanding(self) -> dict[str, int]:
        return dict(self.busy)

    def health(self) -> dict[str, bool]:
        return dict.fromkeys(self.busy, True)

    def follow(self, routing_table: RoutingTable) -> None:
        self.follows = routing_table.number

    def call(self, ask: Callable[[Any], Any]) -> Any:
        return ask(self)

    def strike(self) -> None:
        self.may_end.set()

    def stop(self, *, drain: bool) -> None:
        assert drain
        self.drains.set()
        self.may_end.wait()


class Draining:
    """A gateway that drains in a thread, and its coordinator's actor."""

    def __init__(self, poll: Callable[..., Any], coordinator: Coordinator) -> None:
        self.front = Front()
        actor = SimpleNamespace(poll=_method(poll), leave=_method(coordinator.leave))
        self._gateway = _Attending(actor, "10.0.0.9", GatewayConfig(), None)
        self._gateway._front = self.front  # type: ignore[assignment]
        self._thread = threading.Thread(target=lambda: self._gateway.close(drain=True))
        self._thread.start()
        self.front.drains.wait()

    @property
    def goes_on(self) -> bool:
        return self._thread.is_alive()

    def strike(self) -> None:
        self._gateway.strike()
        self._thread.join()

    def end(self) -> None:
        self.front.may_end.set()
        self._thread.join()


def _method(call: Callable[..., Any]) -> Any:
    def remote(*given: Any) -> Future[Any]:
        made: Future[Any] = Future()
        try:
            made.set_result(call(*given))
        except ray_adapter.RayCallError as exc:
            made.set_exception(exc)
        return made

    return SimpleNamespace(remote=remote)


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    """It knows the first routing table; its calls return at once."""
    monkeypatch.setattr(ray_adapter, "result", lambda ref, _seconds: ref.result())
    made = Coordinator()
    made.write(status(), _table(1), GatewayConfig(), 1)
    return made


def _table(number: int) -> RoutingTable:
    members = expected_routing_table(planned("1xrtx3090"), 2)
    return RoutingTable(number=number, bounds=members.bounds, members=(), gateways=2)


def test_a_gateway_that_drains_follows_and_tells(coordinator: Coordinator) -> None:
    """One that is silent is forgotten, and the engines of its requests are stopped."""

    def poll(name: str, seen: Any, since: int, _seconds: float) -> Any:
        return coordinator.poll(name, seen, since, 0)

    def told(number: int, busy: int) -> bool:
        reports = coordinator.write(status(), None, GatewayConfig(), 1).gateways.values()
        return [(one.number, one.outstanding) for one in reports] == [(number, {"a/0": busy})]

    draining = Draining(poll, coordinator)
    try:
        until(lambda: told(1, 1), "its report")
        coordinator.write(status(), _table(2), GatewayConfig(), 1)
        until(lambda: draining.front.follows == 2, "the newer table")
        draining.front.busy["a/0"] = 0
        until(lambda: told(2, 0), "the end of its request")
        assert draining.goes_on
    finally:
        draining.end()
    assert not coordinator.write(status(), None, GatewayConfig(), 1).gateways


def test_a_drain_goes_on_where_the_coordinator_fails(coordinator: Coordinator) -> None:
    """Requests that are under way need no coordinator."""
    asked: list[Any] = []

    def poll(*given: Any) -> Any:
        asked.append(given)
        kind = ray_adapter.ActorRestartsError if len(asked) < 3 else ray_adapter.ActorDiedError
        raise kind("it is gone")

    draining = Draining(poll, coordinator)
    try:
        until(lambda: len(asked) == 3, "three polls")
        assert draining.goes_on
    finally:
        draining.end()


def test_a_second_signal_breaks_off_the_drain(coordinator: Coordinator) -> None:
    def poll(name: str, seen: Any, since: int, _seconds: float) -> Any:
        return coordinator.poll(name, seen, since, 0)

    draining = Draining(poll, coordinator)
    assert draining.goes_on
    draining.strike()
    assert not draining.goes_on
