"""The Ray actor of one engine. Ray keeps it alive; it keeps the engine alive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.host import Hosted, prepare_environment

if TYPE_CHECKING:
    from turbofit.launch.cluster.order import Order, Standing

__all__ = ["Agent", "start_agent"]

#: Times that Ray starts an actor again whose process died; beyond it is something to be told of.
_RESTARTS: Final = 10
#: Calls at once: one that waits for news, and others that must not wait for it.
_CALLS: Final = 4


class Agent:
    """Hosts one engine; see `host.Hosted`.

    Args:
        order: what to launch. After a restart by Ray it is the same one.
    """

    def __init__(self, order: Order) -> None:
        prepare_environment(order.plan)
        self._hosted = Hosted(order)
        self._hosted.start()

    def follow(self, since: int, seconds: float) -> Standing:
        """See `Hosted.follow`."""
        return self._hosted.follow(since, seconds)

    def allow(self, peers: tuple[str, ...]) -> None:
        """See `Hosted.allow`."""
        self._hosted.allow(peers)

    def stop(self, seconds: float) -> bool:
        """See `Hosted.stop`."""
        return self._hosted.stop(seconds)


def start_agent(order: Order, group: Any) -> Any:
    """Start an engine's actor in a placement group of one GPU; its handle.

    The engine's other GPUs are held by their own placement groups; which ones it sees is the
    plan's to say, by UUID.

    Args:
        order: what to launch.
        group: of the engine's first GPU.
    """
    there = ray_adapter.in_group(group)
    return ray_adapter.start_actor(
        Agent, order, strategy=there, restarts=_RESTARTS, calls=_CALLS, gpus=1
    )
