"""``turbofit serve --cluster`` on a Ray cluster of pretend machines."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.support.cloud import Clients, Serving, served
from tests.support.serving import needs
from tests.support.waiting import until

pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow]
needs("ray", "lmdeploy", "fastapi", "torchvision")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two unlike nodes."""
    nodes = (("large", "1xa100", 1), ("one", "1xl4", 1))
    with served(tmp_path_factory.mktemp("state"), *nodes) as made:
        made.wait("large", "one")
        yield made


@pytest.mark.exhaustive  # `test_controller` holds it without Ray
def test_1_a_node_that_cannot_keep_the_promise_says_why(serving: Serving) -> None:
    serving.cloud.add("small", "1xl4:free=3GiB", 1)
    until(lambda: serving.state_of("small") == "unfit", "the small node to be looked at")
    assert "GPU 0 is" in serving.status()["small"]["why_not"]


@pytest.mark.exhaustive  # `test_node` kills a server, `test_controller` tries its node again
def test_2_a_server_is_killed_and_the_node_serves_again(serving: Serving) -> None:
    before = until(lambda: serving.server("one"), "the server")  # 0 would be our own group
    with Clients(serving.port) as clients:
        clients.more(10)
        os.kill(before, signal.SIGKILL)
        until(lambda: serving.server("one") not in (0, before), "another server")
        serving.wait("large", "one")
        clients.more(10)
    assert not clients.wrong


def test_3_a_drained_node_loses_nothing(serving: Serving) -> None:
    code, told = serving.cli("cluster", "drain", "nobody")
    assert (code, told["error"]["kind"]) == (2, "usage")
    with Clients(serving.port) as clients:
        clients.more(10)
        assert serving.cli("cluster", "drain", serving.cloud.identity("one"))[0] == 0
        serving.child.wait_for(": drained")
        until(lambda: serving.state_of("one") == "drained", "its answer, which may be late")
        serving.wait("large")
        clients.more(10)
    assert set(clients.outcomes) == {"answered"}


@pytest.mark.exhaustive  # `test_controller` holds it without Ray
def test_4_a_node_that_has_gone_is_forgotten_and_another_joins(serving: Serving) -> None:
    serving.cloud.kill("one")
    until(lambda: "one" not in serving.status(), "the node to be forgotten")
    serving.cloud.add("late", "1xl4", 1)
    serving.wait("large", "late")


def test_5_a_killed_controller_costs_nothing_and_another_takes_over(serving: Serving) -> None:
    before = serving.servers()
    assert any(before)  # the small node has none
    with Clients(serving.port) as clients:
        clients.more(10)
        serving.kill()
        clients.more(20)
        serving.again().wait_for("taken over")
        clients.more(10)
    assert set(clients.outcomes) == {"answered"}
    assert serving.servers() == before


def test_6_an_end_leaves_nothing(serving: Serving) -> None:
    assert serving.end() == 0
    assert not serving.processes()
    code, told = serving.cli("cluster", "status")
    assert (code, told["error"]["kind"]) == (2, "usage")
