"""GPUs of the cluster that this turbofit holds: a placement group of Ray for each.

Ray chooses which GPU of a node a placement group gets. So all that are free on a node are taken,
each is asked which one it is, and those that no plan uses are given back: what is planned is what
is held. Ray gives them back when this process ends, however it ends.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from turbofit.launch.cluster import ray_adapter

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

__all__ = ["Places", "which"]

#: As long as a node may take to be measured: on a busy one a worker of Ray alone takes a minute.
_SECONDS: Final = 120.0
#: And so much longer for each GPU: a thousand groups took 80 s (bench/cluster/FAULTS.md).
_EACH: Final = 0.1


def which() -> list[str]:
    """Ray's ids of the GPUs that this task has; runs on the node."""
    return ray_adapter.gpus_of_this_task()


class Places:
    """What is held, by node and by Ray's id of the GPU."""

    def __init__(self) -> None:
        self._reserved: dict[str, dict[str, Any]] = {}
        #: Nodes that are released; a worker may still be taking their GPUs.
        self._left: set[str] = set()
        self._lock = threading.Lock()

    def take(self, nodes: Iterable[str]) -> None:
        """Take every GPU that is free on these nodes, beside those that are held already.

        Where Ray fails before it has told which they are, they are given back.
        """
        free = ray_adapter.free_gpus()
        wanted = [node for node in nodes for _ in range(free.get(node, 0))]
        groups: list[tuple[str, Any]] = []
        try:
            for node in wanted:
                group = ray_adapter.create_gpu_group(node)
                groups.append((node, group))
            tasks = _query_gpus(groups)
        except BaseException:
            for _, group in groups:
                with suppress(Exception):  # the others are given back
                    ray_adapter.remove_group(group)
            raise
        for ref, (node, group) in tasks.items():
            gpu = _told(ref)
            with self._lock:
                reserved = gpu is not None and node not in self._left
                if gpu is not None and reserved:
                    self._reserved.setdefault(node, {})[gpu] = group
            if not reserved:
                ray_adapter.remove_group(group)

    def on(self, node: str) -> tuple[str, ...]:
        """Ray's ids of the GPUs that are held on a node."""
        with self._lock:
            return tuple(self._reserved.get(node, {}))

    def place(self, node: str, gpu: str) -> Any:
        """The placement group of a GPU."""
        return self._reserved[node][gpu]

    def keep(self, node: str, gpus: Collection[str]) -> None:
        """Give back all of a node's but these."""
        with self._lock:
            reserved = self._reserved.get(node, {})
            given = [reserved.pop(gpu) for gpu in set(reserved) - set(gpus)]
        for group in given:
            ray_adapter.remove_group(group)

    def drop(self, node: str) -> None:
        """Give back all of a node's."""
        self.keep(node, ())

    def leave(self, node: str) -> None:
        """Give back all of a node's for good, what is being taken there too."""
        with self._lock:
            self._left.add(node)
        self.drop(node)


def _query_gpus(groups: Sequence[tuple[str, Any]]) -> dict[Any, tuple[str, Any]]:
    """Ask each group that has its GPU which one it is; the references to the answers."""
    deadline = time.monotonic() + _SECONDS + _EACH * len(groups)
    task = ray_adapter.Task(which, gpus=1)
    tasks = {}
    for node, group in groups:
        if ray_adapter.group_ready(group, max(0.1, deadline - time.monotonic())):
            tasks[task.start(ray_adapter.in_group(group))] = (node, group)
        else:  # somebody else was faster
            ray_adapter.remove_group(group)
    if tasks:
        ray_adapter.wait_all(tasks, _SECONDS + _EACH * len(tasks))
    return tasks


def _told(ref: Any) -> str | None:
    """Which GPU it is; None where the node is going, so that what it holds is not held."""
    try:
        (gpu,) = ray_adapter.result(ref, 0.1)
    except Exception:  # noqa: BLE001 - Ray raises many types for it
        return None
    return str(gpu)
