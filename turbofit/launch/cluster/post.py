"""One engine of the cluster as the keeper sees it: its actor, its news, its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.cluster import EngineStatus
from turbofit.gateway.roll import Member
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.order import Standing

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.launch.cluster.order import Order

__all__ = ["Post"]

#: Seconds that an actor may keep a question for news.
_PATIENCE: Final = 10.0
#: An actor that Ray starts again is asked again after so many seconds.
_PAUSE: Final = 0.5


class Post:
    """An engine, from the start of its actor to its end.

    Args:
        order: what is launched.
        place: the placement group of its first GPU.
        share: its requests beside the others' shares.
        host_bytes: host memory of images in flight to it.
        start: makes the actor; see `agent.start_agent`.
    """

    def __init__(
        self,
        order: Order,
        place: Any,
        *,
        share: float,
        host_bytes: int,
        start: Callable[[Order, Any], Any],
    ) -> None:
        self.order, self.share, self.host_bytes = order, share, host_bytes
        self.standing = Standing(tokens=order.plan.kv.tokens)
        self.draining = self.lost = False
        #: When a draining engine is stopped whatever it has, and the first roll that says so.
        self.drained_by, self.drained_in = float("inf"), 0
        self.restarts = 0
        self._place, self._start = place, start
        self._peers = order.peers
        self._actor: Any = None
        self._again = 0.0
        #: The question for news that is under way, and that for its end.
        self.news: Any = None
        self.ending: Any = None

    def begin(self) -> None:
        """Start its actor."""
        self.standing = Standing(tokens=self.order.plan.kv.tokens)
        self._actor = self._start(self.order, self._place)
        self._ask(0)

    def hear(self) -> bool:
        """Take the news that has come; whether anything changed."""
        if self.news is None:
            if self._actor is not None and not self.lost and time.monotonic() >= self._again:
                self._ask(0)
            return False
        try:
            told: Standing = ray_adapter.result(self.news, 0)
        except ray_adapter.ResultTimeoutError:
            return False
        except ray_adapter.ActorDiedError as exc:
            return self._died(exc)
        except ray_adapter.ActorRestartsError:
            return self._restarted()
        except ray_adapter.RayCallError as exc:  # whatever it is, it is one engine's
            return self._died(exc)
        changed = told.number != self.standing.number
        if told.pid != self.standing.pid and self._peers != self.order.peers:
            self._actor.allow.remote(self._peers)  # another process: it has the order alone
        self.standing = told
        self._ask(told.number)
        return changed

    def member(self) -> Member | None:
        """What gateways are told of it; None while it serves nobody."""
        standing = self.standing
        if self.lost or standing.state != "ready":
            return None
        return Member(
            name=self.order.name,
            url=standing.url,
            key=self.order.key,
            share=self.share,
            gate=standing.gate,
            gate_to_end=standing.gate_to_end,
            host_bytes=self.host_bytes,
            draining=self.draining,
        )

    def allow(self, peers: tuple[str, ...]) -> None:
        """From now on these gateways may reach it."""
        self._peers = peers
        if self._actor is not None and not self.lost:
            self._actor.allow.remote(peers)

    def stop(self, seconds: float) -> None:
        """Ask it to end; `ended` tells when it has."""
        if self._actor is not None and not self.lost and self.ending is None:
            self.ending = self._actor.stop.remote(seconds)

    def ended(self) -> bool:
        """Whether its actor has ended the engine, or is gone itself."""
        if self.ending is None:
            return True
        return bool(ray_adapter.wait_all([self.ending], 0))

    def end(self) -> None:
        """Let the actor go, and with it whatever is left of the engine."""
        if self._actor is not None:
            ray_adapter.kill_actor(self._actor)
        self._actor = self.news = self.ending = None
        self.lost = True

    def status(self, *, up: bool, outstanding: int) -> EngineStatus:
        """For people and scripts."""
        standing = self.standing
        return EngineStatus(
            name=self.order.name,
            gpus=self.order.plan.parallel.groups[0],
            state="draining" if self.draining and standing.state == "ready" else standing.state,
            said=standing.said,
            url=standing.url,
            up=up,
            draining=self.draining,
            outstanding=outstanding,
            tokens=standing.tokens,
            restarts=self.restarts,
            folder=standing.folder,
            error=str(standing.error.get("message", "")),
            warnings=standing.warnings,
        )

    def _ask(self, since: int) -> None:
        self.news = self._actor.follow.remote(since, _PATIENCE)

    def _restarted(self) -> bool:
        """Its process died, and Ray starts it again."""
        self.restarts += 1
        self.news, self._again = None, time.monotonic() + _PAUSE
        self.standing = Standing(
            tokens=self.order.plan.kv.tokens, said="Ray starts its actor again"
        )
        return True

    def _died(self, exc: BaseException) -> bool:
        """Its actor is gone for good."""
        why = ray_adapter.one_line(exc)
        self.lost, self.news = True, None
        self.standing = Standing(
            state="failed",
            tokens=self.order.plan.kv.tokens,
            error={
                "kind": "launch",
                "message": f"the actor of engine {self.order.name} died: {why}",
                "hint": "see ray logs on its node",
                "exit_code": 5,
            },
        )
        return True
