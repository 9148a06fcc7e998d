"""One engine of the cluster as the controller sees it: its actor, its news, its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.cluster import EngineStatus
from turbofit.gateway.routing.routing_table import Member
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.engine_spec import EngineState

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.launch.cluster.engine_spec import EngineSpec

__all__ = ["LAST_SECONDS", "Replica"]

#: Beside the drain, before an engine that was asked to end is killed.
LAST_SECONDS: Final = 15.0
#: Seconds that an actor may hold back the answer until there is news.
_PATIENCE: Final = 10.0
#: An actor that Ray starts again is asked again after so many seconds.
_PAUSE: Final = 0.5


class Replica:
    """An engine, from the start of its actor to its end.

    Args:
        engine_spec: what is launched.
        place: the placement group of its first GPU.
        share: its requests beside the others' shares.
        host_bytes: host memory of images in flight to it.
        start: makes the actor; see `agent.start_agent`.
    """

    def __init__(
        self,
        engine_spec: EngineSpec,
        place: Any,
        *,
        share: float,
        host_bytes: int,
        start: Callable[[EngineSpec, Any], Any],
    ) -> None:
        self.engine_spec, self.share, self.host_bytes = engine_spec, share, host_bytes
        self.engine_state = EngineState(tokens=engine_spec.plan.kv.tokens)
        self.draining = self.actor_lost = False
        #: When a draining engine is stopped whatever it has; the first routing table that says so.
        self.drained_by, self.drained_in = float("inf"), 0
        self.restarts = 0
        self._place, self._start = place, start
        self._peers = engine_spec.peers
        self._actor: Any = None
        self._again = 0.0
        #: The question for news that is under way, and that for its end.
        self.news: Any = None
        self.ending: Any = None
        #: When it counts as ended, whether its actor has answered that question or not.
        self._ended_by = float("inf")

    def begin(self) -> None:
        """Start its actor."""
        self.engine_state = EngineState(tokens=self.engine_spec.plan.kv.tokens)
        self._actor = self._start(self.engine_spec, self._place)
        self._ask(0)

    def hear(self) -> bool:
        """Take the news that has come; whether anything changed."""
        if self.news is None:
            if self._actor is not None and not self.actor_lost and time.monotonic() >= self._again:
                self._ask(0)
            return False
        try:
            told: EngineState = ray_adapter.result(self.news, 0)
        except ray_adapter.ResultTimeoutError:
            return False
        except ray_adapter.ActorDiedError as exc:
            return self._died(exc)
        except ray_adapter.ActorRestartsError:
            return self._restarted()
        except ray_adapter.RayCallError as exc:  # whatever it is, it is one engine's
            return self._died(exc)
        changed = told.number != self.engine_state.number
        if told.pid != self.engine_state.pid and self._peers != self.engine_spec.peers:
            self._actor.allow.remote(self._peers)  # another process: it has the specification alone
        self.engine_state = told
        self._ask(told.number)
        return changed

    def member(self) -> Member | None:
        """What gateways are told of it; None while it serves nobody."""
        engine_state = self.engine_state
        if self.actor_lost or engine_state.state != "ready":
            return None
        return Member(
            name=self.engine_spec.name,
            url=engine_state.url,
            key=self.engine_spec.key,
            share=self.share,
            gate=engine_state.gate,
            kv=engine_state.kv,
            host_bytes=self.host_bytes,
            draining=self.draining,
        )

    def allow(self, peers: tuple[str, ...]) -> None:
        """From now on these gateways may reach it."""
        self._peers = peers
        if self._actor is not None and not self.actor_lost:
            self._actor.allow.remote(peers)

    def stop(self, seconds: float) -> None:
        """Ask it to end within so many seconds; `ended` tells when it has."""
        if self._actor is not None and not self.actor_lost and self.ending is None:
            self._ended_by = time.monotonic() + seconds + LAST_SECONDS
            self.ending = self._actor.stop.remote(seconds)

    def ended(self) -> bool:
        """Whether its actor has ended the engine, is gone itself, or has not answered in time."""
        if self.ending is None or time.monotonic() >= self._ended_by:
            return True
        return bool(ray_adapter.wait_all([self.ending], 0))

    def end(self) -> None:
        """Let the actor go, and with it whatever is left of the engine."""
        if self._actor is not None:
            ray_adapter.kill_actor(self._actor)
        self._actor = self.news = self.ending = None
        self.actor_lost = True

    def status(self, *, up: bool, outstanding: int) -> EngineStatus:
        """For people and scripts."""
        engine_state = self.engine_state
        return EngineStatus(
            name=self.engine_spec.name,
            gpus=self.engine_spec.plan.parallel.groups[0],
            state="draining"
            if self.draining and engine_state.state == "ready"
            else engine_state.state,
            said=engine_state.said,
            url=engine_state.url,
            up=up,
            draining=self.draining,
            outstanding=outstanding,
            tokens=engine_state.tokens,
            restarts=self.restarts,
            folder=engine_state.folder,
            error=str(engine_state.error.get("message", "")),
            warnings=engine_state.warnings,
        )

    def _ask(self, since: int) -> None:
        self.news = self._actor.follow.remote(since, _PATIENCE)

    def _restarted(self) -> bool:
        """Its process died, and Ray starts it again."""
        self.restarts += 1
        self.news, self._again = None, time.monotonic() + _PAUSE
        self.engine_state = EngineState(
            tokens=self.engine_spec.plan.kv.tokens, said="Ray starts its actor again"
        )
        return True

    def _died(self, exc: BaseException) -> bool:
        """Its actor is gone for good."""
        why = ray_adapter.one_line(exc)
        self.actor_lost, self.news = True, None
        self.engine_state = EngineState(
            state="failed",
            tokens=self.engine_spec.plan.kv.tokens,
            error={
                "kind": "launch",
                "message": f"the actor of engine {self.engine_spec.name} died: {why}",
                "hint": "see ray logs on its node",
                "exit_code": 5,
            },
        )
        return True
