"""Checks what must hold in every simulated day, whenever it could break."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.errors import TurbofitError
from turbofit.planning.examine.cards import open_margin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.simulation.clients import Request
    from bench.simulation.engine import SimulatedEngine
    from bench.simulation.gateway import SimulatedGatewayThread
    from bench.simulation.scheduler import Process
    from bench.simulation.world import World
    from turbofit.core.plan import Plan
    from turbofit.serving.runs import RunRecord

#: Seconds that a request may take at most: the wait for a place, an engine that is silent until it
#: is given up, another one, its restarts.
_LONGEST = 900.0
#: Engines that one request may end, and seconds from a death until all that met it are told.
_MOST_DEATHS, _TOLD = 3, 0.5
#: How long a request is suspected, or refused.
_HOUR = 3600.0
#: Seconds after which nothing is held of an engine for clients that left.
_FORGOTTEN = 15.0
#: Seconds after a broken disk within which all leases are written again.
_WRITTEN = 60.0
#: How a request may end: with a status, because its client left, or with turbofit.
_ENDS = ("200", "429", "503", "422", "403", "left", "lost")
#: Seconds for which a request whose client left is accused of its engine's end.
_LEFT = 10.0


class Invariants:
    """The checks of one simulated day; each failure goes to ``World.violate``.

    Args:
        world: the world of the day.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        #: What each turbofit's newest plan will take of each card at most, its margin included.
        self._needs: dict[Process, dict[int, int]] = {}
        #: When engines ended, by the killing request.
        self._deaths: dict[str, list[float]] = {}
        #: Texts of requests that were at an engine that ended or hung of itself.
        self.accused_by_chance: set[str] = set()

    # -- engines and their memory

    def engine_started(self, engine: SimulatedEngine) -> None:
        """Check that no two engines of one turbofit are on the same card."""
        for other in self._world.machine.engines.values():
            shared = set(other.gpus) & set(engine.gpus)
            if other is not engine and shared and other.owner is engine.owner:
                self._world.violate(f"two engines of one turbofit on GPU {engine.gpus}")
                break

    def out_of_memory(self, engine: SimulatedEngine) -> None:
        """Check that an engine lacks memory for a request only if nobody could foresee it."""
        world = self._world
        world.count("out of memory while serving")
        if not self._surprised(engine):
            world.violate(
                f"engine {engine.pid} ran out of memory though nobody took any and it took no more "
                f"than its forecast: {[world.machine.cards[i].held for i in engine.gpus]}"
            )

    def _surprised(self, engine: SimulatedEngine) -> bool:
        """Return whether the engine's cards hold memory that its plan could not foresee.

        It is a stranger's who came later, of an engine above its forecast, or of another turbofit's
        engine: if that ends while a cache is sized, the cache gets too large (known, not mended).
        """
        machine, cards = self._world.machine, set(engine.gpus)
        strangers = any(
            index in cards and since >= engine.planned_at
            for index, since in machine.strangers.values()
        )
        engines = [one for one in machine.engines.values() if cards & set(one.gpus)]
        others = any(one.fault.more or one.owner is not engine.owner for one in engines)
        return strangers or others

    def reserved(self, process: Process, plan: Plan) -> None:
        """Check that a plan takes no memory that another turbofit's engines will still take."""
        for gpu in plan.ledgers:
            left = self._world.machine.cards[gpu.index].free - self._pending(process, gpu.index)
            overlaps = gpu.most - gpu.used > max(0, left)
            if overlaps and not self._unknown(process, gpu.index):
                self._world.violate(
                    f"a plan of turbofit {process.pid} takes {gpu.most - gpu.used} bytes of GPU "
                    f"{gpu.index}, where others leave {left}"
                )
        self._needs[process] = {
            gpu.index: gpu.most - gpu.used + open_margin(gpu) for gpu in plan.ledgers
        }

    def _pending(self, process: Process, index: int) -> int:
        """Return the bytes of a card that other turbofits' engines will still take.

        What they hold is subtracted, except for the part of a cache beyond its plan.
        """
        pending = 0
        for other, needs in self._needs.items():
            if other is not process:
                engines = self._engines_of(other, index)
                held = self._world.machine.cards[index].held
                taken = sum(held.get(engine.pid, 0) - engine.surplus for engine in engines)
                pending += max(0, needs.get(index, 0) - taken)
        return pending

    def _unknown(self, process: Process, index: int) -> bool:
        """Return whether another turbofit's lease may be old or its engine exceed its forecast."""
        machine = self._world.machine
        fresh = self._world.scheduler.now > machine.disk_bad_until + _WRITTEN
        more = [
            one for other in self._needs if other is not process
            for one in self._engines_of(other, index) if one.fault.more
        ]  # fmt: skip
        return bool(more) or not fresh or machine.disk_error is not None

    def _engines_of(self, process: Process | None, index: int) -> list[SimulatedEngine]:
        engines = self._world.machine.engines.values()
        return [one for one in engines if one.owner is process and index in one.gpus]

    def process_ended(self, process: Process) -> None:
        """Forget what an ended turbofit had planned."""
        self._needs.pop(process, None)

    # -- requests

    def arrived(self, engine: SimulatedEngine, request: Request) -> None:
        """Check that a request which ended does not reach an engine."""
        request.answered_by.append(engine.pid)
        if engine.hung:
            self.engine_fails(engine)
        if request.end:
            self._world.violate(f"request {request.number} reached an engine after its end")

    def ended_by(self, request: Request) -> None:
        """Check that equal requests end at most three engines an hour.

        A death counts only if its request was sent after the death before.
        """
        now, deaths = self._world.scheduler.now, self._deaths.setdefault(request.text, [])
        deaths[:] = [at for at in deaths if at + _HOUR > now]
        if not deaths or request.sent > deaths[-1] + _TOLD:
            deaths.append(now)
        if len(deaths) > _MOST_DEATHS:
            self._world.violate(f"{len(deaths)} engines ended by one request, {request.text}")

    def engine_fails(self, engine: SimulatedEngine) -> None:
        """Note the requests at an engine that fails by itself: they may be refused later."""
        there = [one.request for one in engine.exchanges if one.request is not None]
        left = engine.last_left
        if left is not None and left[0] + _LEFT > self._world.scheduler.now:
            there.append(left[1])
        self.accused_by_chance.update(one.text for one in there)

    def forget(self) -> None:
        """Forget all deaths: turbofit ended, or takes a lost card for the cause of a death."""
        self._deaths.clear()

    def holds(self, engine: SimulatedEngine) -> None:
        """Check that the units being encoded at an engine stay within the plan."""
        gateway = self._world.gateway
        if gateway is None or not gateway.serves(engine):
            return
        gate = gateway.gateway.bounds.gate
        units = sum(one.encoding for one in engine.exchanges)
        if gate is not None and units > gate:
            self._world.violate(
                f"a forward of engine {engine.pid} may have {units} units, not {gate}"
            )

    def request_ended(self, request: Request) -> None:
        """Check that a request ended once, in time, with an answer or a clear error."""
        world, number, said = self._world, request.number, b"".join(request.body)
        took = world.scheduler.now - request.sent
        if took > _LONGEST:
            world.violate(f"request {number} took {took:.0f} s")
        if request.starts > 1 or request.finals > 1:
            world.violate(f"request {number} was answered {request.finals} times")
        if request.end.isdigit() and (request.starts != 1 or request.finals != 1):
            world.violate(
                f"request {number}: {request.starts} beginnings and {request.finals} ends"
            )
        clear = (request.end == "400" and b"too_many_images" in said) or (
            request.end == "500" and b"simulated" in said
        )
        if request.end not in _ENDS and not clear:
            world.violate(f"request {number} ended with {request.end}: {request.body[:1]!r}")
        ended = b"[DONE]" in said or b'"error"' in said
        if request.end == "200" and request.stream and not ended:
            world.violate(
                f"the stream of request {number} ended without end or error: {said[-200:]!r}"
            )
        # Who ends no engine is never refused for one, unless an engine ended of itself.
        if b'"convicted"' in said and not request.poison and not self.accused_by_chance:
            world.violate(f"request {number} ends no engine and is refused: {said!r}")
        if world.open_requests == 0:
            sent, gateway = len(world.requests), world.gateway
            world.scheduler.after(_FORGOTTEN, lambda: self._all_given_back(sent, gateway))

    def _all_given_back(self, sent: int, gateway: SimulatedGatewayThread | None) -> None:
        """Check that nothing of an engine is held when no request was open for a while."""
        world = self._world
        if gateway is None or not gateway.alive or gateway is not world.gateway:
            return
        if len(world.requests) != sent:
            return
        for engine in gateway.gateway.engines:
            held = (
                engine.gate.counted,
                engine.host_bytes,
                engine.outstanding,
                engine.gate.reserved,
            )
            if any(held):
                world.violate(f"engine {engine.index} is held though no request is open: {held}")
        if gateway.gateway.admission.waiting:
            world.violate(f"{gateway.gateway.admission.waiting} wait though no request is open")

    # -- the end

    def nothing_left(self, process: Process | None) -> None:
        """Check that no engine, byte, request or lease is left, and that records can be read."""
        world = self._world
        for engine in world.machine.engines.values():
            world.violate(f"engine {engine.pid} is left")
        for index, card in world.machine.cards.items():
            if card.held:
                world.violate(f"GPU {index} still holds {card.held}")
        for one in world.requests:
            if not one.end:
                world.violate(f"request {one.number} never ended")
        for path in sorted((world.folder / "leases").glob("*.json")):
            if process is not None and path.name.startswith(f"{process.pid}-"):
                world.violate(f"the lease {path.name} is left")
        list(self._records())

    def serves_by_its_record(self, process: Process) -> None:
        """Check that the record of a serving turbofit, which `turbofit ps` reads, says so."""
        states = [one.state for one in self._records() if one.pid == process.pid]
        if states != ["ready"]:
            self._world.violate(f"turbofit {process.pid} serves, and its record says {states}")

    def _records(self) -> Iterator[RunRecord]:
        """Yield the records of runs that can be read; others are violations."""
        from turbofit.core.struct import decode
        from turbofit.serving.runs import RunRecord

        for path in sorted((self._world.folder / "turbofit" / "runs").glob("*/run.json")):
            try:
                yield decode(path.read_bytes(), RunRecord, what=path.name)
            except TurbofitError as exc:  # noqa: PERF203 - each file counts
                self._world.violate(f"{path.parent.name}/run.json cannot be read: {exc.message}")
