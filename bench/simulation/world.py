"""A simulated world: a machine, turbofit on it, its clients, and what must always hold."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import tempfile
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.simulation.clients import MARK, Request
from bench.simulation.engine import SimulatedEngine, StartFault
from bench.simulation.invariants import Invariants
from bench.simulation.machine import SimulatedMachine
from bench.simulation.scheduler import Event, Process, Scheduler

if TYPE_CHECKING:
    from bench.simulation.gateway import SimulatedGatewayThread, VirtualLoop
    from turbofit.core.plan import EnginePlan, Plan

#: Seconds after which a supervisor checks its engines without news.
_IDLE = 900.0
#: The same while one of its engines starts or rests: deadlines are noticed at most this late.
_BUSY = 15.0
#: The same while an engine owes an answer: where nobody looks, its silence does not count.
_OWING = 5.0
#: Seconds between a gateway's looks at its engines while requests are open.
_LOOK = 10.0


@dataclass
class Result:
    """The result of a day; ``processor`` are the seconds of processor time that it took."""

    seed: int
    violations: list[str]
    counts: dict[str, int]
    digest: str
    steps: int
    log: list[str] = field(repr=False, default_factory=list)
    processor: float = 0.0


class Violation(AssertionError):  # noqa: N818
    """Raised where something that must always hold does not."""


class World:
    """The state of one simulated day.

    Args:
        seed: the seed of all random numbers.
        spec: the cards, as a SPEC.
    """

    def __init__(self, seed: int, spec: str) -> None:
        self.seed = seed
        self.scheduler = Scheduler(lambda exc: self.violate(f"a thread ended with {exc!r}"))
        self.log: list[str] = []
        self.violations: list[str] = []
        self.counts: dict[str, int] = {}
        self._digest = hashlib.blake2b(digest_size=16)
        self._pid = 1000
        self.rng = random.Random(seed)
        #: Keys of installations: random, and equal for equal seeds.
        self.secrets = types.SimpleNamespace(token_bytes=random.Random(-1 - seed).randbytes)
        self.machine = SimulatedMachine(spec)
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="turbofit-sim-", dir=base))
        self._folder = str(self.folder)
        #: The newest plans of each turbofit, by its process, each with when it was made.
        self.plans: dict[int, list[tuple[float, Plan]]] = {}
        self.requests: list[Request] = []
        #: The turbofit that clients ask.
        self.primary: Process | None = None
        self.gateway: SimulatedGatewayThread | None = None
        #: How the next starts of engines end, before it is left to chance that they live.
        self.start_faults: list[StartFault] = []
        self.tear_next = False
        #: Its history is over, and its threads are let go of.
        self.closed = False
        self.open_requests = 0
        self.loops: list[VirtualLoop] = []
        #: Those that wait between two looks: at an engine that starts, and at the cards.
        self.probes: dict[Event, None] = {}
        self.monitors: dict[Event, None] = {}
        self.invariants = Invariants(self)

    # -- the history

    def trace(self, text: str) -> None:
        """Add a line to the day's log, without the name of its folder."""
        line = f"{self.scheduler.now:.6f} {text.replace(self._folder, 'STATE')}"
        self._digest.update(line.encode())
        self.log.append(line)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def violate(self, what: str) -> None:
        """Note that something that must hold did not."""
        self.trace(f"VIOLATION {what}")
        self.violations.append(what)

    def new_pid(self) -> int:
        self._pid += 1
        return self._pid

    def result(self) -> Result:
        """Return the result of the day until now."""
        return Result(
            self.seed, [*self.violations], dict(self.counts), self._digest.hexdigest(),
            self.scheduler.steps, [*self.log],
        )  # fmt: skip

    # -- processes

    def start_engine(
        self, pid: int, argv: Sequence[str], env: Mapping[str, str]
    ) -> SimulatedEngine:
        """Start an engine for turbofit; it ends with turbofit, as guard.py ensures."""
        fault = self.start_faults.pop(0) if self.start_faults else StartFault()
        engine = SimulatedEngine(self, pid, argv, env, fault)
        engine.owner = self.scheduler.process
        if engine.owner is not None:
            engine.owner.ends.append(engine.kill)
        self.invariants.engine_started(engine)
        self.trace(f"engine {pid} starts on {engine.gpus} port {engine.port} {fault}")
        self.count("engine starts")
        return engine

    def planned(self, plan: Plan) -> None:
        """Note a plan that the current turbofit made."""
        process = self.scheduler.process
        plans = self.plans.setdefault(process.pid if process is not None else 0, [])
        plans.append((self.scheduler.now, plan))
        del plans[:-8]
        if process is not None and plan.fits:
            self.invariants.reserved(process, plan)

    def plan_of(self, gpus: list[int], ratio: float) -> tuple[float, Plan, EnginePlan]:
        """Return the plan of an engine that was started, with its part, and when it was made.

        It is the newest plan with these cards; a start may lower its ratio
        (`serving.engine.launches`).
        """
        process = self.scheduler.process
        plans = self.plans.get(process.pid, []) if process is not None else []
        for made, plan in reversed(plans):
            for engine in plan.engines:
                lowered = ratio < engine.settings.cache_max_entry_count + 1e-9
                if list(engine.gpus) == gpus and lowered:
                    return made, plan, engine
        raise Violation(f"an engine was started on {gpus} at {ratio} by no plan")

    # -- requests

    def request_in(self, body: bytes) -> Request | None:
        found = MARK.search(body)
        if found is None:
            return None
        if found[1]:
            return self.requests[int(found[1])]
        text = found[2].decode()
        alike = [one for one in self.requests if one.text == text]
        return next((one for one in alike if not one.end), alike[-1])

    def send(self, request: Request) -> None:
        """Send a client's request to the gateway, if one listens."""
        self.requests.append(request)
        request.sent = self.scheduler.now
        gateway = self.gateway
        self.count("requests")
        if gateway is None or not gateway.listens:
            request.end = "closed"
            self.count("requests to nobody")
            return
        self.open_requests += 1
        if self.open_requests == 1:
            self._look()
        gateway.open(request)

    def _look(self) -> None:
        """Let the gateway check its engines regularly while requests are open."""
        gateway = self.gateway
        if gateway is not None and self.open_requests:
            gateway.look()
            self.scheduler.after(_LOOK, self._look)

    def finished(self, request: Request) -> None:
        """Check a request that ended; after a 503 its client may try again."""
        self.open_requests -= 1
        self.count(f"ended {request.end}")
        self.trace(f"request {request.number} {request.end} at {request.answered_by}")
        self.invariants.request_ended(request)
        if request.end == "503" and not request.poison and request.tries:
            again = replace(request, tries=request.tries - 1, end="", starts=0, finals=0, body=[])
            again.gone, again.answered_by = asyncio.Event(), []
            self.scheduler.after(self.rng.uniform(0.5, 20.0), lambda: self._again(again))

    def _again(self, request: Request) -> None:
        """Send a request again, as SDKs do."""
        request.number = len(self.requests)
        self.send(request)

    # -- time and ends

    def stir(self, process: Process | None = None) -> None:
        """Wake the supervisor of a turbofit, of the current one by default."""
        owner = process or self.scheduler.process
        if owner is not None:
            owner.stirs += 1
            if owner.stirred is not None:
                owner.stirred.poke()

    def rest(self, seconds: float) -> None:
        """Let a supervisor pause between two checks; checks without news are left out."""
        here = self.scheduler.process
        assert here is not None
        if here.stirs == here.seen:
            here.stirred = here.stirred or Event(self.scheduler)
            here.stirred.wait(max(seconds, self._pause(here)))
        if here.stirs != here.seen:
            self.scheduler.sleep(seconds)
        here.seen = here.stirs

    def _pause(self, process: Process) -> float:
        """Return the seconds until a supervisor has something to do even without news."""
        states = {one.state for one in process.engines}
        pause = _IDLE if states == {"ready"} else _BUSY
        clients = (client for one in process.engines for client in (one._probe, one.clients))
        if any(client is not None and client.owes for client in clients):
            pause = _OWING
        again = [one.again_at for one in process.engines if one.state in ("waiting", "broken")]
        return min([pause, *(at - self.scheduler.now for at in again)])

    def kill(self, process: Process) -> None:
        """Kill a turbofit: its files close, its connections break, its engines end."""
        if process.alive:
            self.trace(f"turbofit {process.pid} is killed")
            self._end(process, "killed")

    def _end(self, process: Process, how: int | str) -> None:
        """End a turbofit, with all that it had open."""
        self.count(f"exit {how}")
        self.invariants.forget()
        self.scheduler.end(process)
        self.invariants.process_ended(process)
        for descriptor in process.descriptors:
            os.close(descriptor)
        process.descriptors.clear()

    def new_stranger(self, index: int, size: int) -> int:
        """Let another program take bytes of a card; returns its process id."""
        pid = self.new_pid()
        self.machine.names[pid] = "jupyter"
        self.machine.allocate(index, pid, size)
        self.machine.strangers[pid] = index, self.scheduler.now
        return pid

    # -- turbofit

    def turbofit(self, main: Callable[[], int], *, primary: bool = True) -> Process:
        """Start a turbofit; its exit is noted."""
        process = Process(self.new_pid(), self.scheduler.skew)
        if primary:
            self.primary = process
        self.machine.names[process.pid] = "turbofit"

        def body() -> None:
            try:
                code = main()
            except Violation as exc:
                self.violate(str(exc))
                code = 70
            except Exception:  # noqa: BLE001 - a traceback is what must not be
                if self.closed:
                    return
                self.violate(f"a traceback: {traceback.format_exc(limit=-6)}")
                code = 1
            self.trace(f"turbofit {process.pid} exits {code}")
            if process.gateway is not None and process.gateway.listens:
                self.violate(f"turbofit {process.pid} leaves its gateway open")
            # What a slow disk holds up, Python's threads end before the process does.
            if process.descriptors and self.scheduler.now > self.machine.disk_slow_until:
                self.violate(f"turbofit left {len(process.descriptors)} files open")
            self._end(process, code)

        self.trace(f"turbofit {process.pid} starts")
        self.scheduler.thread(body, process)
        return process

    def close(self) -> None:
        """Remove all that is left of the world."""
        self.closed = True
        self.scheduler.discard_threads()
        for loop in self.loops:
            loop.abandon()
        self.loops.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
