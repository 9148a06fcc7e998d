"""What Ray says is told by the adapter's own errors."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from turbofit.core.errors import MachineError, PackageError
from turbofit.core.installation import install_command
from turbofit.launch.cluster import ray_adapter


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the connection needs the package, and says so."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(PackageError, match="not installed") as info:
        ray_adapter.connect(None)
    assert install_command("ray") in info.value.hint


def test_each_failure_of_ray_has_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most exact one, though Ray's classes inherit from each other."""
    ray = pytest.importorskip("ray")
    kinds = ray.exceptions
    inner = ModuleNotFoundError("No module named 'turbofit'")
    cases: list[tuple[Exception, type[Exception]]] = [
        (kinds.GetTimeoutError("late"), ray_adapter.ResultTimeoutError),
        (kinds.ActorDiedError(), ray_adapter.RayCallError),
        (kinds.TaskUnschedulableError("no node"), ray_adapter.NodeLostError),
        (kinds.NodeDiedError("gone"), ray_adapter.NodeLostError),
        (kinds.RayTaskError("f", "trace", inner), ray_adapter.RayCallError),
    ]
    for said, expected in cases:

        def get(_ref: Any, timeout: float, said: Exception = said) -> None:
            assert timeout == 0.5
            raise said

        monkeypatch.setattr(ray, "get", get)
        with pytest.raises(ray_adapter.RayCallError) as info:
            ray_adapter.result(object(), 0.5)
        assert type(info.value) is expected
        assert str(info.value) == str(said)
        assert info.value.__cause__ is said
    assert info.value.cause is inner


def test_a_silent_head_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a minute of waiting Ray raises another error than where it finds no actor."""
    ray = pytest.importorskip("ray")

    def silent(*_: object, **__: object) -> None:
        raise ray.exceptions.GetTimeoutError("There was timeout, probably the GCS server is dead")

    monkeypatch.setattr("ray.get_actor", silent)
    monkeypatch.setattr("ray.util.list_named_actors", silent)
    with pytest.raises(MachineError, match="head of the Ray cluster does not answer"):
        ray_adapter.find_actor("x")
    with pytest.raises(MachineError, match="head of the Ray cluster does not answer"):
        ray_adapter.actor_names()
