"""The board: questions and answers, and the places of gateways."""

from __future__ import annotations

import threading

import pytest

from tests.launch.cluster.test_promise import planned
from tests.waiting import HANG
from turbofit.core.cluster import ClusterStatus
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.roll import Roll
from turbofit.launch.cluster.board import Board, Seen
from turbofit.launch.cluster.promise import expected_roll


@pytest.fixture(scope="module")
def roll() -> Roll:
    """Of a small cluster."""
    return expected_roll(planned("1xrtx3090"), 2)


def status() -> ClusterStatus:
    """Of nothing much."""
    return ClusterStatus(
        name="m", model="m", source="ray", pretend=True, at="now", urls=(), promise="", nodes=()
    )


def test_a_question_and_its_answer(roll: Roll) -> None:
    """It waits until the process that serves has looked, and answered."""
    board = Board()
    told: list[object] = []
    asker = threading.Thread(target=lambda: told.append(board.ask({"kind": "drain"}, 10)))
    asker.start()
    asked: tuple[tuple[int, dict[str, object]], ...] = ()
    while not asked:
        asked = board.write(status(), roll, GatewayConfig(), 0).asked
    ((number, document),) = asked
    assert document == {"kind": "drain"}
    board.answer(number, {"said": "done"})
    asker.join()
    assert told == [{"said": "done"}]
    assert board.status() == status()


def test_a_question_that_nobody_answers() -> None:
    """None, in time."""
    assert Board().ask({}, 0.05) is None


def test_as_many_gateways_as_were_planned_for(roll: Roll) -> None:
    """The next is refused until one leaves."""
    board = Board()
    board.write(status(), roll, GatewayConfig(serial=True), 1)
    one = Seen(address="10.0.0.1", outstanding={"a/0": 3})
    told = board.attend("first", one, -1, 0)
    assert told.roll == roll
    assert told.config is not None
    assert told.config.serial
    assert "were planned for: 2" in board.attend("second", one, -1, 0).refused
    assert board.write(status(), roll, GatewayConfig(), 1).gateways == {"first": one}
    board.leave("first")
    assert not board.attend("second", one, -1, 0).refused


def test_news_come_as_soon_as_there_are_any(roll: Roll) -> None:
    """A gateway waits for a newer roll, not for its turn."""
    board = Board()
    board.write(status(), roll, GatewayConfig(), 1)
    told: list[Roll | None] = []
    waiter = threading.Thread(
        target=lambda: told.append(board.attend("g", Seen(address="a"), roll.number, HANG).roll)
    )
    waiter.start()
    newer = Roll(number=roll.number + 1, bounds=roll.bounds, members=(), gateways=2)
    board.write(status(), newer, GatewayConfig(), 1)
    waiter.join(HANG)
    assert told == [newer]
