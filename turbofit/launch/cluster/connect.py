"""The connection to a Ray cluster, and who is in it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import MachineError
from turbofit.core.struct import Struct
from turbofit.launch.cluster import ray_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RayConnection", "RayNode", "connected"]

#: A head that is silent for so long is gone; Ray itself ends all its processes after 60 s.
_SILENT: Final = 45.0
_LOOK_SECONDS: Final = 1.0


class RayNode(Struct):
    """A node that Ray has; ``gpus`` as Ray counts them; ``leaving``: it is being drained."""

    id: str
    name: str
    address: str
    gpus: int
    leaving: bool = False


class RayConnection:
    """A cluster that this process is connected to; ``here`` is this node's id.

    Once `watched` was called it looks in a thread: while the head is gone, Ray does not return.
    """

    def __init__(self) -> None:
        self.address, self.here = ray_adapter.this_process()
        self._seen: dict[str, RayNode] = {}
        self._at, self._error = 0.0, ""

    def watched(self) -> dict[str, RayNode]:
        """The nodes that were there when the head was last heard of, a second ago; never waits.

        Raises:
            MachineError: the cluster's head does not answer any more.
        """
        if not self._at:
            self._seen, self._at = self.alive(), time.monotonic()
            threading.Thread(target=self._look, name="alive", daemon=True).start()
        silent = time.monotonic() - self._at
        if silent > _SILENT:
            raise MachineError(
                self._error or f"the head of the Ray cluster has been silent for {silent:.0f} s",
                hint="see ray status",
            )
        return self._seen

    def alive(self) -> dict[str, RayNode]:
        """The nodes that are there now, by id.

        Raises:
            MachineError: the cluster's head does not answer.
        """
        try:
            nodes = ray_adapter.nodes()
        except Exception as exc:  # noqa: BLE001 - Ray raises any type when its head is gone
            raise MachineError(
                f"the Ray cluster at {self.address} does not answer: {ray_adapter.one_line(exc)}",
                hint="see ray status",
            ) from None
        leaving = ray_adapter.draining_nodes()
        return {
            node["NodeID"]: RayNode(
                id=node["NodeID"],
                name=node.get("NodeManagerHostname") or node["NodeName"],
                address=node["NodeManagerAddress"],
                gpus=int(node["Resources"].get("GPU", 0)),
                leaving=node["NodeID"] in leaving,
            )
            for node in nodes
            if node["Alive"]
        }

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                self._seen, self._at, self._error = self.alive(), time.monotonic(), ""
            except MachineError as exc:
                self._error = exc.message


@contextmanager
def connected(address: str | None) -> Iterator[RayConnection]:
    """Be connected to a cluster; what this process started there ends with the connection."""
    ray_adapter.connect(address)
    try:
        yield RayConnection()
    finally:
        ray_adapter.disconnect()
