"""GPUs of the cluster that this turbofit holds: a placement group of Ray for each.

Ray chooses which GPU of a node a placement group gets. So all that are free on a node are taken,
each is asked which one it is, and those that no plan uses are given back: what is planned is what
is held. They are gone with this process, however it ends.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["Places", "which"]

#: As long as a node may take to be measured: on a busy one a worker of Ray alone takes a minute.
_SECONDS: Final = 120.0
#: And so much longer for each GPU: a thousand groups took 80 s (bench/cluster/FAULTS.md).
_EACH: Final = 0.1


def which() -> list[str]:
    """Ray's ids of the GPUs that this task has; runs on the node."""
    import ray

    return [str(one) for one in ray.get_gpu_ids()]


class Places:
    """What is held, by node and by Ray's id of the GPU."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Any]] = {}
        #: Nodes that are done with; a worker may still be taking theirs.
        self._left: set[str] = set()
        self._lock = threading.Lock()

    def take(self, nodes: Iterable[str]) -> None:
        """Take every GPU that is free on these nodes, beside those that are held already."""
        import ray
        from ray._private.state import available_resources_per_node
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        free = available_resources_per_node()
        groups = [
            (node, self._group(node))
            for node in nodes
            for _ in range(int(free.get(node, {}).get("GPU", 0)))
        ]
        deadline = time.monotonic() + _SECONDS + _EACH * len(groups)
        task = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(which)
        asked = {}
        for node, group in groups:
            if group.wait(max(0.1, deadline - time.monotonic())):
                there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
                asked[task.options(scheduling_strategy=there).remote()] = (node, group)
            else:  # somebody else was faster
                ray.util.remove_placement_group(group)
        if asked:
            seconds = _SECONDS + _EACH * len(asked)
            ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        for ref, (node, group) in asked.items():
            gpu = _told(ref)
            with self._lock:
                held = gpu is not None and node not in self._left
                if gpu is not None and held:
                    self._held.setdefault(node, {})[gpu] = group
            if not held:
                ray.util.remove_placement_group(group)

    def on(self, node: str) -> tuple[str, ...]:
        """Ray's ids of the GPUs that are held on a node."""
        with self._lock:
            return tuple(self._held.get(node, {}))

    def place(self, node: str, gpu: str) -> Any:
        """The placement group of a GPU."""
        return self._held[node][gpu]

    def keep(self, node: str, gpus: Collection[str]) -> None:
        """Give back all of a node's but these."""
        import ray

        with self._lock:
            held = self._held.get(node, {})
            given = [held.pop(gpu) for gpu in set(held) - set(gpus)]
        for group in given:
            ray.util.remove_placement_group(group)

    def drop(self, node: str) -> None:
        """Give back all of a node's."""
        self.keep(node, ())

    def leave(self, node: str) -> None:
        """Give back all of a node's for good, what is being taken there too."""
        with self._lock:
            self._left.add(node)
        self.drop(node)

    @staticmethod
    def _group(node: str) -> Any:
        import ray

        return ray.util.placement_group(
            [{"GPU": 1.0}], strategy="STRICT_PACK", name=f"turbofit-{uuid4().hex}",
            bundle_label_selector=[{"ray.io/node-id": node}],
        )  # fmt: skip


def _told(ref: Any) -> str | None:
    """Which GPU it is; None where the node is going, so that what it holds is not held."""
    import ray

    try:
        (gpu,) = ray.get(ref, timeout=0.1)
    except Exception:  # noqa: BLE001 - Ray has many words for it
        return None
    return str(gpu)
