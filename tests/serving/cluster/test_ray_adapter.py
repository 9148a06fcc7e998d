"""What Ray is asked, and how its errors are told; `test_serve_cluster` asks Ray itself."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from turbofit.core.errors import MachineError, PackageError, UsageError
from turbofit.core.installation import install_command
from turbofit.serving.cluster import ray_adapter


def connect(address: str | None = None) -> None:
    with ray_adapter.connected(address):
        pass


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the connection needs the package, and says so."""
    monkeypatch.setattr(ray_adapter, "find_spec", lambda _: None)
    monkeypatch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(PackageError, match="not installed") as info:
        connect()
    assert install_command("ray") in info.value.hint


def test_ray_client_is_refused() -> None:
    """It is no node: engines could not be reached from it."""
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="Ray Client"):
        connect("ray://10.0.0.1:10001")


@pytest.fixture
def ray_init(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Ray's connection, in a process whose variables stay as they were."""
    for name in ("RAY_ENABLE_AUTO_CONNECT", "RAY_gcs_server_port_wait_time_s"):
        monkeypatch.setenv(name, "0")
    ray = Mock()
    ray.exceptions.AuthenticationError = PermissionError
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_adapter, "find_spec", lambda _: True)
    init: Mock = ray.init
    return init


def test_an_address_where_nothing_listens_is_told_at_once(ray_init: Mock) -> None:
    with socket.socket() as silent:  # bound, and no server
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(MachineError, match=f"{address}: .*Connection refused"):
            connect(address)
    ray_init.assert_not_called()


@pytest.mark.parametrize(
    ("given", "whole"),
    [("head", "head:6379"), ("10.0.0.9:6380", "10.0.0.9:6380"), ("[::1]", "[::1]:6379")],
)
def test_ray_is_asked_where_a_connection_is_accepted(
    ray_init: Mock, monkeypatch: pytest.MonkeyPatch, given: str, whole: str
) -> None:
    accept = Mock()
    monkeypatch.setattr(ray_adapter.socket, "create_connection", accept)
    connect(given)
    host, _, port = whole.rpartition(":")
    assert accept.call_args.args[0] == (host.strip("[]"), int(port))
    assert ray_init.call_args.kwargs["address"] == whole


def test_the_cluster_of_this_host_is_ray_s_to_find(ray_init: Mock) -> None:
    connect()
    assert ray_init.call_args.kwargs["address"] == "auto"


@pytest.mark.parametrize("text", ["a:b", "h:99999"])
def test_what_is_no_address_is_refused(ray_init: Mock, text: str) -> None:
    with pytest.raises(MachineError, match=text):
        connect(text)
    ray_init.assert_not_called()


def ray_node(number: int, gpus: int, alive: bool = True) -> dict[str, Any]:
    return {
        "NodeID": f"{number}" * 56, "NodeManagerHostname": "box", "Alive": alive,
        "NodeManagerAddress": f"10.0.0.{number}", "Resources": {"GPU": gpus} if gpus else {},
    }  # fmt: skip


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray's public call tells; its status tells what is held, and who is drained."""
    told = [ray_node(1, 4), ray_node(2, 2), ray_node(3, 0), ray_node(4, 8, alive=False)]
    states = [
        SimpleNamespace(
            node_id=f"{number}" * 56, node_status=state, used_resources=lambda held=held: held
        )
        for number, state, held in ((1, "DRAINING", {}), (2, "RUNNING", {"GPU": 1.0}))
    ]
    status = SimpleNamespace(active_nodes=states, idle_nodes=[])
    sdk = SimpleNamespace(get_cluster_status=lambda _: status)
    for name in ("ray.autoscaler", "ray.autoscaler.v2"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: told, __path__=[]))
    monkeypatch.setitem(sys.modules, "ray.autoscaler.v2.sdk", sdk)
    return told


def test_nodes_with_held_gpus_and_drained_ones_are_told(nodes: list[dict[str, Any]]) -> None:
    one, two, three = ray_adapter.nodes("10.0.0.1:6379").values()
    assert (one.name, one.address, one.gpus, one.leaving) == ("box-111111", "10.0.0.1", 4, True)
    assert (two.leaving, two.why_not) == (False, "jobs of Ray hold 1 of its 2 GPUs")
    assert three.why_not == "Ray counts no GPU there"
    assert not one.why_not


def test_without_rays_inner_modules_each_gpu_counts_as_free(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray moves them between versions: no node must seem to have no GPU for it."""
    for name in ("ray._private", "ray._private.state", "ray.autoscaler.v2.sdk"):
        monkeypatch.setitem(sys.modules, name, None)
    found = ray_adapter.nodes("10.0.0.1:6379").values()
    assert [(node.gpus, node.leaving) for node in found] == [(4, False), (2, False), (0, False)]
    assert [node.why_not for node in found] == ["", "", "Ray counts no GPU there"]


def test_a_silent_head_is_said(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Mock(side_effect=RuntimeError("Timed out while\nwaiting for GCS"))
    monkeypatch.setattr(sys.modules["ray.autoscaler.v2.sdk"], "get_cluster_status", silent)
    with pytest.raises(MachineError, match="does not answer: Timed out while waiting for GCS"):
        ray_adapter.nodes("10.0.0.1:6379")


@pytest.mark.parametrize(("tries", "held"), [(1, True), (3, True), (99, False)])
def test_a_name_is_held_by_one_process(
    monkeypatch: pytest.MonkeyPatch, tries: int, held: bool
) -> None:
    """Ray frees the name of a holder that was killed after a moment."""
    paused, asked = list[float](), list[int]()

    def create() -> str:
        if len(asked) < tries:
            asked.append(1)
            raise ValueError("The name is already taken")
        return "handle"

    def options(**given: Any) -> SimpleNamespace:
        assert (given["name"], given["namespace"]) == ("mine", "turbofit-held")
        assert "lifetime" not in given  # it ends with this process
        return SimpleNamespace(remote=create)

    context = SimpleNamespace(get_node_id=lambda: "here")
    ray = SimpleNamespace(
        remote=lambda **_: lambda _: SimpleNamespace(options=options),
        get_runtime_context=lambda: context,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_adapter, "_on", lambda node: node)
    monkeypatch.setattr(ray_adapter.time, "sleep", paused.append)
    assert (ray_adapter.held_name("mine") == "handle") is held
    assert sum(paused) == (tries * 0.5 if held else 10.0)
