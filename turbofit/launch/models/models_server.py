"""Several models at one address: whose engines run, which model gives memory back, which is next.

One loop in the main thread decides; each model's engines run in a session of their own. Starts
follow one another: LMDeploy's cache is a share of what is free just then.
"""

from __future__ import annotations

import time
from contextlib import suppress
from math import ceil
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.core.struct import Struct
from turbofit.core.units import format_duration
from turbofit.gateway.models.attached_gateway import insist
from turbofit.gateway.routing.health import healthy
from turbofit.launch.models.turns import gives_way

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.models.model_session import ModelSession
    from turbofit.launch.serve.supervisor import StopSignal

__all__ = ["ModelsPolicy", "ModelsServer"]

#: Seconds that an engine and the drain may take beyond their deadlines before nobody waits.
_LAST_SECONDS: Final = 120.0


class ModelsPolicy(Struct):
    """When models' engines run; times in seconds.

    ``idle``: engines that nobody asked for so long end; None never. ``at_once`` models run at the
    same time, the others wait for their turn. ``turn``: as long as requests keep coming, a model
    is not ended for another one before it has served so long. ``again``: a model that did not
    start is left alone so long.
    """

    idle: float | None = None
    at_once: int = 1
    turn: float = 30.0
    again: float = 60.0
    tick: float = 0.1


class ModelsServer:
    """All models behind one address.

    Args:
        sessions: in the order in which they start; the first of them start at once, as many as may
            run at the same time.
        front: serves the address; it is started and stopped here.
        policy: when engines run.
        say: takes lines of progress.
    """

    def __init__(
        self,
        sessions: Sequence[ModelSession],
        front: GatewayThread[ModelsGateway],
        policy: ModelsPolicy,
        say: Callable[[str], None],
    ) -> None:
        self._sessions, self._front, self._policy = list(sessions), front, policy
        self._say = say

    def run(self, stop: StopSignal, on_open: Callable[[str], None]) -> signal.Signals:
        """Serve until a signal. Call it in the main thread.

        Args:
            stop: tells of signals.
            on_open: told the address, when the first models are ready.

        Returns:
            The signal that ended it.

        Raises:
            TurbofitError: the address cannot be bound, or one of the first models does not start.
        """
        self._front.start()
        stop.on_second(self._strike)
        stop.abrupt = False
        try:
            first = self._sessions[: self._policy.at_once]
            for session in first:
                if stop.signal is not None:
                    break
                self._start(session)
                while stop.signal is None and session.model.state != "ready":
                    self._collect(session)
                    self._pause()
            if stop.signal is None:
                insist(self._front, _opened)
                on_open(self._front.url)
            while stop.signal is None:
                self._step()
                self._pause()
        finally:
            self._end(stop)
            stop.abrupt = stop.signal is None
        return stop.signal

    def _pause(self) -> None:
        time.sleep(self._policy.tick)

    def _step(self) -> None:
        """Look once at all of them."""
        for session in self._sessions:
            self._look(session)
            if session.model.state == "ready":
                self._forecast(session)
        self._rest_idle()
        self._start_next()

    def _look(self, session: ModelSession) -> None:
        """Take note of a session that has ended; clients are told where it failed."""
        try:
            self._collect(session)
        except TurbofitError as exc:
            again, message = self._policy.again, exc.message
            pause = format_duration(again)
            self._say(f"warning: {session.model.name}: {message}; it is left alone for {pause}")
            until = time.monotonic() + again
            insist(self._front, lambda _: session.model.fail(message, until))

    def _collect(self, session: ModelSession) -> None:
        """Mark a model as asleep whose session has ended.

        Raises:
            TurbofitError: it ended otherwise than in order.
        """
        if session.ended():
            insist(self._front, lambda _: session.model.sleep())

    def _forecast(self, measured: ModelSession) -> None:
        """From a measured start, what those take that were not measured.

        By the weights' bytes, and no less than what was measured. Over.
        """
        seconds = measured.model.start_seconds
        for session in self._sessions if seconds is not None else ():
            ratio = max(1.0, session.weight_bytes / max(1, measured.weight_bytes))
            session.model.forecast = max(session.model.forecast or 0.0, ratio * (seconds or 0.0))

    def _rest_idle(self) -> None:
        """End the engines that nobody asked for long enough, and those that made way."""
        for session in self._sessions:
            model = session.model
            if session.ending or not session.running:
                continue
            if self._closed_idle(model):
                self._say(
                    f"{model.name}: nobody asked for {format_duration(model.idle)}, its engines "
                    "end and give their memory back"
                )
            if model.state == "ending" and not model.in_flight:
                session.end()

    @property
    def _starting(self) -> bool:
        """Whether engines of a model start, or start again after a death."""
        return any(
            model.state == "starting"
            or (
                model.state == "ready"
                and (gateway := model.gateway) is not None
                and gateway.fleet.outage is None  # one that rests keeps nobody waiting
                and not healthy(gateway.fleet)
            )
            for model in (session.model for session in self._sessions)
        )

    def _closed_idle(self, model: ServedModel) -> bool:
        """Whether nobody asked for it long enough, so that it is closed now.

        Not while another one starts: its cache would take a share of what this one gives back.
        """
        seconds = self._policy.idle
        if seconds is None or self._starting or model.state != "ready" or model.idle < seconds:
            return False
        return insist(self._front, lambda _: model.close_idle(seconds))

    def _start_next(self) -> None:
        """Start the model whose request has waited longest, or make room for it."""
        if self._starting or any(one.model.state == "ending" for one in self._sessions):
            return
        waiting = [
            (since, place, session)
            for place, session in enumerate(self._sessions)
            if not session.running
            and session.model.rested
            and (since := self._wanted_since(session.model)) is not None
        ]
        if not waiting:
            return
        _, _, following = min(waiting)
        running = [session for session in self._sessions if session.running]
        if len(running) < self._policy.at_once:
            self._start(following)
            return
        models = [session.model for session in running]
        victim = gives_way(models, self._policy.turn, time.monotonic())
        if victim is not None:
            self._make_way(victim, following.model)

    def _wanted_since(self, model: ServedModel) -> float | None:
        """When somebody began to want it; one that is to run always is wanted since it failed."""
        always = self._policy.idle is None and self._policy.at_once >= len(self._sessions)
        return model.again_at if always and model.state == "failed" else model.wanted_since

    def _make_way(self, victim: ServedModel, following: ServedModel) -> None:
        insist(self._front, lambda _: victim.close())
        expected = following.expected
        known = "" if expected is None else f", which takes about {ceil(expected)} s to start"
        self._say(f"{victim.name} makes way for {following.name}{known}")

    def _start(self, session: ModelSession) -> None:
        insist(self._front, lambda _: session.model.begin())
        session.start()

    def _strike(self) -> None:
        self._front.strike()
        for session in self._sessions:
            session.strike()

    def _end(self, stop: StopSignal) -> None:
        """Let what is under way end, then the engines; nobody waits for a start any longer."""
        with suppress(LaunchError):
            self._front.call(lambda front: front.end())
        self._front.stop(drain=not stop.urgent and stop.signal is not None)
        for session in self._sessions:
            session.end(stop.signal)
        deadline = time.monotonic() + _LAST_SECONDS
        for session in self._sessions:
            session.wait(max(0.0, deadline - time.monotonic()))


def _opened(front: ModelsGateway) -> None:
    front.opened = True
