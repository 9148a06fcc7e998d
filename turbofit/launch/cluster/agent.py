"""The Ray actor of one engine. Ray keeps it alive; it keeps the engine alive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.host import HostedEngine, prepare_environment

if TYPE_CHECKING:
    from turbofit.launch.cluster.engine_spec import EngineSpec, EngineState

__all__ = ["Agent", "start_agent"]

#: Times that Ray starts an actor again whose process died; after that it is reported.
_RESTARTS: Final = 10
#: Calls at once: one that waits for news, and others that must not wait for it.
_CALLS: Final = 4


class Agent:
    """Hosts one engine; see `host.HostedEngine`.

    Args:
        engine_spec: what to launch. After a restart by Ray it is the same one.
    """

    def __init__(self, engine_spec: EngineSpec) -> None:
        prepare_environment(engine_spec.plan)
        self._hosted = HostedEngine(engine_spec)
        self._hosted.start()

    def follow(self, since: int, seconds: float) -> EngineState:
        """See `HostedEngine.follow`."""
        return self._hosted.follow(since, seconds)

    def allow(self, peers: tuple[str, ...]) -> None:
        """See `HostedEngine.allow`."""
        self._hosted.allow(peers)

    def stop(self, seconds: float) -> bool:
        """See `HostedEngine.stop`."""
        return self._hosted.stop(seconds)


def start_agent(engine_spec: EngineSpec, group: Any) -> Any:
    """Start an engine's actor in a placement group of one GPU; its handle.

    The engine's other GPUs are held by their own placement groups; which ones it sees is the
    plan's to say, by UUID.

    Args:
        engine_spec: what to launch.
        group: of the engine's first GPU.
    """
    options = ray_adapter.in_group(group)
    return ray_adapter.start_actor(
        Agent, engine_spec, strategy=options, restarts=_RESTARTS, calls=_CALLS, gpus=1
    )
