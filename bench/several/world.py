"""A simulated world in which one turbofit serves several models on the same cards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.simulation.clients import Request
from bench.simulation.gateway import SimulatedGatewayThread
from bench.simulation.world import Violation, World

if TYPE_CHECKING:
    from bench.simulation.engine import SimulatedEngine
    from turbofit.core.plan import Plan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.models.models_gateway import ModelsGateway

__all__ = ["Front", "ModelRequest", "SeveralWorld"]

_TWO = "two engines of one turbofit"
#: A cache may be so many bytes off its plan: ratios are rounded.
_NOISE = 32 << 20


@dataclass
class ModelRequest(Request):
    """A request that names its model."""

    model: str = ""

    def payload(self) -> bytes:
        return json.dumps({**json.loads(super().payload()), "model": self.model}).encode()


class _App:
    """The address of several models, with what a gateway of one model has beside."""

    def __init__(self, front: ModelsGateway) -> None:
        self.front, self.config = front, front.config

    async def startup(self) -> None:
        return

    async def shutdown(self) -> None:
        await self.front.shutdown()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.front(scope, receive, send)


class Front(SimulatedGatewayThread):
    """The address in virtual time."""

    def __init__(self, world: World, front: ModelsGateway) -> None:
        super().__init__(world, _App(front))  # type: ignore[arg-type]
        self.front = front

    def call(self, ask: Any, seconds: float = 10.0) -> Any:
        return super().call(lambda _: ask(self.front), seconds)

    def gateways(self) -> dict[str, Gateway]:
        """By their models' names, those that are open."""
        return {
            name: model.gateway
            for name, model in self.front.models.items()
            if model.gateway is not None
        }

    def look(self) -> None:
        for gateway in self.gateways().values():
            if self._loop is not None and not self._ended.flag:
                self._loop.call_soon_threadsafe(gateway.monitor.look)


class SeveralWorld(World):
    """One history with several models.

    Args:
        seed: decides everything.
        spec: the cards.
        at_once: models that may hold memory at the same time.
    """

    def __init__(self, seed: int, spec: str, at_once: int) -> None:
        super().__init__(seed, spec)
        self.at_once = at_once
        self._model = ""
        self._last: dict[str, Plan] = {}
        self.models: dict[int, str] = {}
        #: By an engine, the others that served when it started.
        self._beside: dict[int, frozenset[int]] = {}
        #: And what they held of the card that is fullest of them.
        self._held: dict[int, int] = {}
        #: Seconds of the longest request that was answered.
        self.longest = 0.0

    def violate(self, what: str) -> None:
        if not what.startswith(_TWO):
            super().violate(what)

    def start_engine(
        self, pid: int, argv: Sequence[str], env: Mapping[str, str]
    ) -> SimulatedEngine:
        self._model = argv[argv.index("--model-name") + 1]
        before = set(self.running)
        engine = super().start_engine(pid, argv, env)
        self.models[pid] = self._model
        self._beside[pid] = self._settled(pid)
        self._held[pid] = self._held_beside(engine)
        if self._model in before:
            super().violate(f"two engines of {self._model}")
        if len(self.running) > self.at_once:
            super().violate(f"{self.running} run at once, not {self.at_once}")
        return engine

    def _settled(self, pid: int) -> frozenset[int]:
        """Engines beside one that hold what they hold; -1 where another one starts, too."""
        others = [one for one in self.machine.engines.values() if one.pid != pid]
        return frozenset(one.pid if one.listening else -1 for one in others)

    def _held_beside(self, engine: SimulatedEngine) -> int:
        """Bytes that other engines hold of an engine's cards; the most of one card."""
        cards = (self.machine.cards[index].held for index in engine.gpus)
        return max(sum(size for pid, size in held.items() if pid != engine.pid) for held in cards)

    def sized(self, engine: SimulatedEngine) -> None:
        """An engine takes its plan's cache, whatever is free, if nobody came or went meanwhile.

        It takes less where the others grow while it loads, within their parts of the card.
        """
        super().sized(engine)
        beside = self._beside[engine.pid]
        if -1 in beside or beside != self._settled(engine.pid):
            self.count("caches sized while others came or went")
            return
        free = min(self.machine.cards[index].free for index in engine.gpus)
        more = int(free * engine.ratio) - engine.plan.kv.region_bytes
        grown = max(0, self._held_beside(engine) - self._held[engine.pid])
        if not -_NOISE - grown <= more <= _NOISE:
            self.violate(f"the cache of {self.models[engine.pid]} is {more:+,} bytes off its plan")

    @property
    def running(self) -> set[str]:
        """The models whose engines live."""
        return {self.models[pid] for pid in self.machine.engines if pid in self.models}

    def plan_of(self, gpus: list[int], ratio: float) -> Plan:
        """The newest plan of this model; its ratio is fitted to what is free."""
        del ratio
        process = self.scheduler.process
        for plan in reversed(self.plans.get(process.pid, []) if process is not None else []):
            if plan.fits and plan.model.hub_id == self._model:
                self._last[self._model] = plan
                break
        found = self._last.get(self._model)
        if found is None or gpus not in [list(group) for group in found.parallel.groups]:
            raise Violation(f"an engine of {self._model} was started on {gpus} by no plan")
        return found.of_group([list(group) for group in found.parallel.groups].index(gpus))

    def finished(self, request: Request) -> None:
        if request.end == "200":
            self.longest = max(self.longest, self.scheduler.now - request.sent)
        super().finished(request)

    def holds(self, engine: SimulatedEngine) -> None:
        front = self.gateway
        if not isinstance(front, Front) or not front.serves(engine):
            return
        gateway = front.gateways().get(self.models[engine.pid])
        gate = None if gateway is None else gateway.bounds.gate
        units = sum(one.encoding for one in engine.exchanges)
        if gate is not None and units > gate:
            self.violate(f"a forward of engine {engine.pid} may have {units} units, not {gate}")

    def _all_given_back(self, number: int, gateway: Any) -> None:
        if gateway is None or gateway.ended or gateway is not self.gateway:
            return
        if len(self.requests) != number:
            return
        for name, one in gateway.gateways().items():
            for engine in one.engines:
                reserved = 0 if engine.gate is None else engine.gate.reserved
                held = (engine.units, engine.host_bytes, engine.outstanding, reserved)
                if any(held):
                    self.violate(f"{name}: held though no request is open: {held}")
        for name, model in gateway.front.models.items():
            if model.in_flight or model.waiting or gateway.front.bodies_in_memory:
                self.violate(f"{name} has requests though none is open")
