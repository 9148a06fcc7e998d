"""Histories of one turbofit with several models, over simulated engines in virtual time."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

from bench.several.world import Front, ModelRequest, SeveralWorld
from bench.simulation.commands import Turbofit, serve_question
from bench.simulation.substitutes import in_place
from turbofit.core.errors import TurbofitError

__all__ = ["History", "Kind", "Outcome"]

#: Seconds between two looks of the server of models, which looks ten times a second in use.
_TICK = 0.5


@dataclass(frozen=True)
class Kind:
    """What a history is made of.

    ``pause`` are seconds between two requests, on average; ``faults`` deaths of engines,
    an hour.
    """

    name: str
    models: tuple[str, ...]
    spec: str
    options: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    at_once: int = 1
    pause: float = 20.0
    faults: float = 0.0


@dataclass
class Outcome:
    """What a history showed."""

    kind: str
    seconds: float
    starts: int
    requests: dict[str, int]
    longest: float
    deaths: int
    violations: list[str]
    log: list[str] = field(repr=False, default_factory=list)


class _Server(Turbofit):
    """`turbofit serve A B C`."""

    def __init__(self, history: History) -> None:
        super().__init__(history, history.kind.models[0], history.kind.fixed)  # type: ignore[arg-type]
        self._history = history

    def _command(self, stop: Any) -> Any:
        from turbofit.cli.options.models_options import ModelsOptions
        from turbofit.cli.serving.serve_models import PlannedModel, planned_models, serve_models
        from turbofit.cli.serving.serve_plan import preview

        kind = self._history.kind
        arguments, config = serve_question(self._model, tuple(self._fixed.items()))
        options = ModelsOptions(**kind.options)
        if len(kind.models) > 1:
            each: list[dict[str, Any]] = [{"model": name} for name in kind.models]
            shares = (1.0,) * len(each)
            planned, at_once = planned_models(arguments, config, each, shares, options)
        else:
            planned, at_once = [PlannedModel(arguments, config, preview(arguments, config))], 1
        self._history.names = [one.name for one in planned]
        if at_once != kind.at_once:
            self._history.world.violate(f"{at_once} run at once, not {kind.at_once}")
        return serve_models(planned, options, at_once, stop)

    def _failed(self, error: TurbofitError) -> None:
        self._history.world.violate(f"error: {error.message} | {error.hint}")


class History:
    """One server of several models, its clients, and its faults.

    Args:
        seed: decides everything.
        kind: what it is made of.
        starts: engines' starts after which it ends.
    """

    def __init__(self, seed: int, kind: Kind, starts: int) -> None:
        self.rng, self.kind, self.starts = random.Random(seed), kind, starts
        self.world = SeveralWorld(seed, kind.spec, kind.at_once)
        self.names: Sequence[str] = ()
        self.deaths = 0

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.world.scheduler.after(seconds, act)

    def _ask(self) -> None:
        """A client's request, and the next one's time."""
        world, rng = self.world, self.rng
        if self.names and world.gateway is not None and world.gateway.listens:
            one = ModelRequest(
                number=len(world.requests), client=f"10.0.0.{rng.randrange(20)}",
                images=((896, 896),) * rng.randrange(2), stream=rng.random() < 0.5,
                tokens=rng.randrange(1, 6), model=rng.choice(list(self.names)),
                leaves=rng.choice((None,) * 9 + (2.0,)),
            )  # fmt: skip
            world.send(one)
        self.later(rng.expovariate(1 / self.kind.pause), self._ask)

    def _fault(self) -> None:
        """An engine dies of itself."""
        engines = [one for one in self.world.machine.engines.values() if one.listening]
        if engines:
            self.deaths += 1
            self.rng.choice(engines).crash()
        self.later(self.rng.expovariate(self.kind.faults / 3600), self._fault)

    def run(self) -> Outcome:
        """Until there were so many starts; then the server ends in order."""
        world, scheduler = self.world, self.world.scheduler
        server = _Server(self)
        with in_place(world), patch(
            "turbofit.gateway.thread.GatewayThread", partial(Front, world)
        ), patch(
            "turbofit.launch.models.models_server.ModelsServer._pause",
            lambda _: scheduler.sleep(_TICK),
        ):  # fmt: skip
            began = scheduler.now
            server.start()
            self.later(1.0, self._ask)
            if self.kind.faults:
                self.later(600.0, self._fault)
            while world.counts.get("engine starts", 0) < self.starts and not world.violations:
                scheduler.run(scheduler.now + 600)
                if not server.alive:
                    world.violate("the server ended by itself")
            self._close(server)
            return self._outcome(scheduler.now - began)

    def _close(self, server: _Server) -> None:
        """Nobody asks any more; it ends in order, and leaves nothing."""
        world, scheduler = self.world, self.world.scheduler
        self.names = ()
        scheduler.run(scheduler.now + 900)
        server.signal(signal.SIGTERM)
        scheduler.run(scheduler.now + 180)
        if server.alive:
            world.violate("it did not end within 180 s of SIGTERM")
        for engine in world.machine.engines.values():
            world.violate(f"engine {engine.pid} is left")
        for index, card in world.machine.cards.items():
            if card.held:
                world.violate(f"GPU {index} still holds {card.held}")
        for lease in (world.folder / "leases").glob("*.json"):
            world.violate(f"the lease {lease.name} is left")
        for one in world.requests:
            if not one.end:
                world.violate(f"request {one.number} never ended")

    def _outcome(self, seconds: float) -> Outcome:
        world = self.world
        ends: dict[str, int] = {}
        for one in world.requests:
            ends[one.end] = ends.get(one.end, 0) + 1
            if one.end not in ("200", "left") and not self.kind.faults:
                world.violate(f"request {one.number} ended with {one.end}: {one.body[:1]!r}")
        return Outcome(
            self.kind.name, seconds, world.counts.get("engine starts", 0), ends,
            world.longest, self.deaths, [*world.violations], [*world.log],
        )  # fmt: skip
