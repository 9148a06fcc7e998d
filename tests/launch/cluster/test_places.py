"""GPUs that are taken: a Ray that fails meanwhile."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.places import Places

NODE = "00000000"


class FailingRay:
    """Three GPUs of one node; one of its functions fails once."""

    def __init__(self, fails: str) -> None:
        self._fails = fails
        self.free = ["0", "1", "2"]

    def free_gpus(self) -> dict[str, int]:
        return {NODE: len(self.free)}

    def create_gpu_group(self, node: str) -> str:
        if len(self.free) == 1:
            self._may_fail("create_gpu_group")
        return self.free.pop(0)

    def group_ready(self, group: str, _seconds: float) -> bool:
        self._may_fail("group_ready")
        return True

    def in_group(self, group: str) -> str:
        return group

    def start(self, group: str) -> tuple[str, ...]:
        if group == "1":
            self._may_fail("start")
        return (group,)

    def wait_all(self, refs: Collection[Any], _seconds: float) -> set[Any]:
        self._may_fail("wait_all")
        return set(refs)

    def result(self, ref: tuple[str, ...], _seconds: float) -> tuple[str, ...]:
        return ref

    def remove_group(self, group: str) -> None:
        self.free.append(group)

    def _may_fail(self, name: str) -> None:
        if name == self._fails:
            self._fails = ""
            raise RuntimeError("the head did not answer")


@pytest.mark.parametrize("fails", ["create_gpu_group", "group_ready", "start", "wait_all"])
def test_what_is_taken_while_ray_fails_is_given_back(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be lost for as long as this process lives; the next try finds it free."""
    ray, places = FailingRay(fails), Places()
    for name in (
        "free_gpus", "create_gpu_group", "group_ready", "in_group", "wait_all", "result",
        "remove_group",
    ):  # fmt: skip
        monkeypatch.setattr(ray_adapter, name, getattr(ray, name))
    monkeypatch.setattr(ray_adapter, "Task", lambda _function, gpus: ray)
    with pytest.raises(RuntimeError, match="did not answer"):
        places.take([NODE])
    assert sorted(ray.free) == ["0", "1", "2"]
    assert places.on(NODE) == ()
    places.take([NODE])
    assert set(places.on(NODE)) == {"0", "1", "2"}
