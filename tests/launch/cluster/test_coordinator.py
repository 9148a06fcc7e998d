"""The coordinator: questions and answers, and the places of gateways."""

from __future__ import annotations

import threading

import pytest

from tests.launch.cluster.test_promise import planned
from tests.waiting import HANG, until
from turbofit.core.cluster import ClusterStatus
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.routing.routing_table import RoutingTable
from turbofit.launch.cluster import extra_gateway
from turbofit.launch.cluster.coordinator import SILENT_SECONDS, Coordinator, GatewayReport
from turbofit.launch.cluster.promise import expected_routing_table


@pytest.fixture(scope="module")
def routing_table() -> RoutingTable:
    """Of a small cluster."""
    return expected_routing_table(planned("1xrtx3090"), 2)


def status() -> ClusterStatus:
    """Of nothing much."""
    return ClusterStatus(
        name="m", model="m", source="ray", pretend=True, at="now", urls=(), promise="", nodes=()
    )


def test_a_question_and_its_answer(routing_table: RoutingTable) -> None:
    """It waits until the process that serves has looked, and answered."""
    coordinator = Coordinator()
    told: list[object] = []
    asker = threading.Thread(target=lambda: told.append(coordinator.ask({"kind": "drain"}, 10)))
    asker.start()
    questions: tuple[tuple[int, dict[str, object]], ...] = ()
    while not questions:
        questions = coordinator.write(status(), routing_table, GatewayConfig(), 0).questions
    ((number, document),) = questions
    assert document == {"kind": "drain"}
    coordinator.answer(number, {"said": "done"})
    asker.join()
    assert told == [{"said": "done"}]
    assert coordinator.status() == status()


def test_a_question_that_nobody_answers() -> None:
    """None, in time."""
    assert Coordinator().ask({}, 0.05) is None


def test_a_question_that_was_not_taken_in_time_is_withdrawn(routing_table: RoutingTable) -> None:
    """Whoever asked was told that nobody answered: it must not be done later."""
    coordinator = Coordinator()
    coordinator.ask({"kind": "drain"}, 0.0)
    assert coordinator.write(status(), routing_table, GatewayConfig(), 0).questions == ()


def test_an_answer_of_before_a_restart_answers_nothing_else(routing_table: RoutingTable) -> None:
    """Numbers of questions begin above those of the process before."""
    numbers = []
    for _ in range(2):
        coordinator = Coordinator()
        asker = threading.Thread(target=lambda one=coordinator: one.ask({}, HANG))
        asker.start()
        questions: tuple[tuple[int, dict[str, object]], ...] = ()
        while not questions:
            questions = coordinator.write(status(), routing_table, GatewayConfig(), 0).questions
        numbers.append(questions[0][0])
        coordinator.answer(numbers[0] - 1, {"said": "to the question before"})
        coordinator.answer(numbers[-1], {"said": "done"})
        asker.join(HANG)
    assert numbers[0] < numbers[1]


def test_who_came_first_keeps_its_place(routing_table: RoutingTable) -> None:
    """After a restart all polls come anew, before the coordinator knows how many there may be."""
    coordinator = Coordinator()
    one = GatewayReport(address="10.0.0.1")
    for name in ("first", "second"):
        coordinator.poll(name, one, -1, 0)
    coordinator.write(status(), routing_table, GatewayConfig(), 1)
    assert "were planned for" in coordinator.poll("second", one, -1, 0).refused
    assert not coordinator.poll("first", one, -1, 0).refused


def test_the_place_of_a_silent_gateway_is_free_only_when_it_has_ended(
    routing_table: RoutingTable,
) -> None:
    """It ends by itself; until then its requests are at the engines."""
    now = 0.0
    coordinator = Coordinator(lambda: now)
    one = GatewayReport(address="10.0.0.1")
    coordinator.write(status(), routing_table, GatewayConfig(), 1)
    coordinator.poll("first", one, -1, 0)
    now = extra_gateway._SECONDS + extra_gateway._SILENT + 1.0
    assert "first" in coordinator.write(status(), None, GatewayConfig(), 1).gateways
    now = SILENT_SECONDS
    assert coordinator.write(status(), None, GatewayConfig(), 1).gateways == {}


def test_as_many_gateways_as_were_planned_for(routing_table: RoutingTable) -> None:
    """The next is refused until one leaves."""
    coordinator = Coordinator()
    coordinator.write(status(), routing_table, GatewayConfig(serial=True), 1)
    one = GatewayReport(address="10.0.0.1", outstanding={"a/0": 3})
    told = coordinator.poll("first", one, -1, 0)
    assert told.routing_table == routing_table
    assert told.config is not None
    assert told.config.serial
    assert "were planned for: 2" in coordinator.poll("second", one, -1, 0).refused
    assert coordinator.write(status(), routing_table, GatewayConfig(), 1).gateways == {"first": one}
    coordinator.leave("first")
    assert not coordinator.poll("second", one, -1, 0).refused


def test_news_come_as_soon_as_there_are_any(routing_table: RoutingTable) -> None:
    """A gateway waits for a newer routing table, not for its turn."""
    coordinator = Coordinator()
    coordinator.write(status(), routing_table, GatewayConfig(), 1)
    told: list[RoutingTable | None] = []
    waiter = threading.Thread(
        target=lambda: told.append(
            coordinator.poll(
                "g", GatewayReport(address="a"), routing_table.number, HANG
            ).routing_table
        )
    )
    waiter.start()
    newer = RoutingTable(
        number=routing_table.number + 1, bounds=routing_table.bounds, members=(), gateways=2
    )
    coordinator.write(status(), newer, GatewayConfig(), 1)
    waiter.join(HANG)
    assert told == [newer]


def test_a_gateway_that_came_before_the_first_table_is_counted_with_it(
    routing_table: RoutingTable,
) -> None:
    """How many there may be comes with the table: it must not begin before."""
    coordinator = Coordinator()
    told: list[str] = []
    report = GatewayReport(address="10.0.0.1")
    waiter = threading.Thread(
        target=lambda: told.append(coordinator.poll("g", report, -1, HANG).refused)
    )
    waiter.start()
    until(lambda: "g" in coordinator._gateways, "the gateway to wait")
    coordinator.write(status(), routing_table, GatewayConfig(), 0)
    waiter.join(HANG)
    assert "were planned for: 1" in told[0]
    assert coordinator.write(status(), None, GatewayConfig(), 0).gateways == {}


def test_gateways_that_were_there_keep_their_places_over_a_restart(
    routing_table: RoutingTable,
) -> None:
    """A new one may ask first, before the coordinator was told anything."""
    coordinator, one = Coordinator(), GatewayReport(address="10.0.0.1")
    coordinator.poll("new", one, -1, 0)
    inbox = coordinator.write(status(), None, GatewayConfig(), 1)
    assert inbox.routing_table == -1
    inbox = coordinator.write(status(), routing_table, GatewayConfig(), 1, {"old": one})
    assert inbox.routing_table == routing_table.number
    assert "were planned for" in coordinator.poll("new", one, -1, 0).refused
    assert not coordinator.poll("old", one, 0, 0).refused
    coordinator.leave("old")
    newer = RoutingTable(number=routing_table.number + 1, bounds=routing_table.bounds, members=())
    inbox = coordinator.write(status(), newer, GatewayConfig(), 1, {"old": one})
    assert "old" not in inbox.gateways
