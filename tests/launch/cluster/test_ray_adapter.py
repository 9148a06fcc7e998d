"""What Ray says is told by the adapter's own errors."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from turbofit.cli.serving import ray_address
from turbofit.core.errors import MachineError, PackageError, UsageError
from turbofit.core.installation import install_command
from turbofit.launch.cluster import ray_adapter


def connect(address: str | None = None) -> None:
    with ray_adapter.connected(address):
        pass


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the connection needs the package, and says so."""
    monkeypatch.setitem(sys.modules, "ray", None)
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


def test_addresses() -> None:
    """``ray`` is the cluster of this host."""
    assert ray_address("ray") is None
    assert ray_address("ray:10.0.0.1:6379") == "10.0.0.1:6379"
    with pytest.raises(UsageError, match="no Ray cluster"):
        ray_address("slurm")


def test_what_is_not_there_yet_is_told_from_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    kinds = ray.exceptions
    cases: list[tuple[Exception, type[Exception]]] = [
        (kinds.GetTimeoutError("late"), ray_adapter.ResultTimeoutError),
        (kinds.ActorDiedError(), ray_adapter.RayCallError),
        (kinds.NodeDiedError("gone"), ray_adapter.RayCallError),
    ]
    for said, expected in cases:

        def get(_ref: Any, timeout: float, said: Exception = said) -> None:
            assert timeout == 0.5
            raise said

        monkeypatch.setattr(ray, "get", get)
        outcome = ray_adapter.outcome(object(), 0.5)
        assert (type(outcome), str(outcome)) == (expected, str(said))


def test_a_silent_head_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a minute of waiting Ray raises another error than where it finds no actor."""
    ray = pytest.importorskip("ray")

    def silent(*_: object, **__: object) -> None:
        raise ray.exceptions.GetTimeoutError("There was timeout, probably the GCS server is dead")

    monkeypatch.setattr("ray.util.list_named_actors", silent)
    with pytest.raises(MachineError, match="head of the Ray cluster does not answer"):
        ray_adapter.named_actors("x")
