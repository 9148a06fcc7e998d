"""One simulated world: a machine, turbofit on it, its clients, and what must always hold."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.simulation.clients import Request
from bench.simulation.engine import SimulatedEngine, StartFault
from bench.simulation.machine import SimulatedMachine
from bench.simulation.scheduler import Event, Process, Scheduler

if TYPE_CHECKING:
    from bench.simulation.gateway import SimulatedGatewayThread
    from bench.simulation.loop import VirtualLoop
    from turbofit.core.plan import Plan

__all__ = ["Violation", "World"]

#: Seconds after which a supervisor looks where nothing was to be seen.
_IDLE = 120.0
#: The same while an engine of its starts, or is about to.
_BUSY = 2.0
#: Seconds that a request may take at most: the wait for a place, an engine that is silent until it
#: is given up, another one, its restarts.
_LONGEST = 900.0
#: Engines that one request may end: the one that had it, and one that it was sent to again.
_MOST_DEATHS = 2
#: Seconds between a gateway's looks at its engines while requests are open.
_LOOK = 5.0
#: Seconds after which nothing is held of an engine for clients that left.
_FORGOTTEN = 15.0
_REQUEST = re.compile(rb"#(?:(\d+)|(poison [\d.e-]+))#")


class Violation(AssertionError):  # noqa: N818
    """Something that must always hold did not."""


class _Secrets:
    """``secrets`` of one history."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(-1 - seed)

    def token_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def token_hex(self, count: int) -> str:
        return self.token_bytes(count).hex()


class World:
    """The state of one history.

    Args:
        seed: decides everything.
        spec: the cards.
    """

    def __init__(self, seed: int, spec: str) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        #: Keys of installations: random, and equal for equal seeds.
        self.secrets = _Secrets(seed)
        self.scheduler = Scheduler()
        self.machine = SimulatedMachine(spec)
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="turbofit-sim-", dir=base))
        #: The newest plans of each turbofit, by its process.
        self.plans: dict[int, list[Plan]] = {}
        self.requests: list[Request] = []
        #: The turbofit that clients ask.
        self.primary: Process | None = None
        self.gateway: SimulatedGatewayThread | None = None
        self.violations: list[str] = []
        self.counts: dict[str, int] = {}
        #: Exits of turbofit: codes, or "killed".
        self.exits: list[int | str] = []
        #: How the next starts of engines end, before it is left to chance that they live.
        self.start_faults: list[StartFault] = []
        #: Memory that others took since the last plan, by which an out-of-memory is explained.
        self.disturbed = False
        #: By card, the living turbofits that have started engines on it.
        self.planned: dict[int, dict[Process | None, None]] = {}
        #: Turbofits and cards where another one sized a cache before theirs was settled. LMDeploy
        #: takes a share of what is free just then, so that no plan holds: known, not mended.
        self.raced: set[tuple[Process | None, int]] = set()
        #: When each killing request has ended an engine.
        self.deaths: dict[str, list[float]] = {}
        self.tear_next = False
        self.open_requests = 0
        self.hangs_allowed = False
        self.log: list[str] = []
        self.loops: list[VirtualLoop] = []
        #: Set where a supervisor has something to see before it would look by itself.
        self.wake = Event(self.scheduler)
        self._digest = hashlib.blake2b(digest_size=16)
        self._pid = 1000

    # -- the history

    def trace(self, text: str) -> None:
        """A line of the history; equal seeds have equal histories."""
        line = f"{self.scheduler.now:.6f} {text.replace(str(self.folder), 'STATE')}"
        self._digest.update(line.encode())
        self.log.append(line)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def violate(self, what: str) -> None:
        """Note that something that must hold did not."""
        self.trace(f"VIOLATION {what}")
        self.violations.append(what)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    # -- processes

    def new_pid(self) -> int:
        self._pid += 1
        return self._pid

    def start_engine(
        self, pid: int, argv: Sequence[str], env: Mapping[str, str]
    ) -> SimulatedEngine:
        """The process that turbofit starts; it ends with turbofit, as guard.py sees to."""
        fault = self.start_faults.pop(0) if self.start_faults else StartFault()
        engine = SimulatedEngine(self, pid, argv, env, fault)
        overlapping = [
            other for other in self.machine.engines.values()
            if other is not engine and set(other.gpus) & set(engine.gpus)
            and other.owner is self.scheduler.process
        ]  # fmt: skip
        engine.owner = self.scheduler.process
        if overlapping:
            self.violate(f"two engines of one turbofit on GPU {engine.gpus}")
        if engine.owner is not None:
            engine.owner.ends.append(engine.kill)
        for index in engine.gpus:
            self.planned.setdefault(index, {})[engine.owner] = None
        self.trace(f"engine {pid} starts on {engine.gpus} port {engine.port} {fault}")
        self.count("engine starts")
        return engine

    def sized(self, engine: SimulatedEngine) -> None:
        """An engine sizes its cache: whose engines on its cards are not settled?"""
        for index in engine.gpus:
            owners = {one.owner: one for one in self.machine.engines.values() if index in one.gpus}
            for process in self.planned.get(index, {}):
                other = owners.get(process)
                if process is not engine.owner and (other is None or not other.listening):
                    self.raced |= {(process, index), (engine.owner, index)}

    def out_of_memory(self, engine: SimulatedEngine) -> None:
        """An engine had too little memory for an admitted request."""
        self.count("out of memory while serving")
        if any((engine.owner, index) in self.raced for index in engine.gpus):
            self.count("out of memory after two turbofits sized caches at once (known)")
            return
        if not self.disturbed and not engine.fault.more:
            self.violate(
                f"engine {engine.pid} ran out of memory though nobody took any and it took no more "
                f"than its forecast: {[self.machine.cards[i].held for i in engine.gpus]}"
            )

    def plan_of(self, gpus: list[int], ratio: float) -> Plan:
        """The plan that an engine was started by: the newest with these cards and this ratio."""
        process = self.scheduler.process
        for plan in reversed(self.plans.get(process.pid, []) if process is not None else []):
            for group, members in enumerate(plan.parallel.groups):
                one = plan.of_group(group)
                same = abs(one.settings.cache_max_entry_count - ratio) < 1e-9
                if list(members) == gpus and same:
                    return one
        raise Violation(f"an engine was started on {gpus} at {ratio} by no plan")

    # -- requests

    def request_in(self, body: bytes) -> Request | None:
        found = _REQUEST.search(body)
        if found is None:
            return None
        if found[1]:
            return self.requests[int(found[1])]
        text = found[2].decode()
        alike = [one for one in self.requests if one.text == text]
        return next((one for one in alike if not one.end), alike[-1])

    def arrived(self, engine: SimulatedEngine, request: Request) -> None:
        """An engine has a request."""
        request.answered_by.append(engine.pid)
        if request.end:
            self.violate(f"request {request.number} reached an engine after its end")

    def ended_by(self, request: Request) -> None:
        """An engine dies of a request: two at most, whoever sends it and however often."""
        deaths = self.deaths.setdefault(request.text, [])
        deaths.append(self.scheduler.now)
        if len(deaths) > _MOST_DEATHS and self.machine.disk_error is None:
            self.violate(f"{len(deaths)} engines ended by one request, {request.text}")

    def holds(self, engine: SimulatedEngine) -> None:
        """Units that are being encoded at one engine stay within the plan."""
        gateway = self.gateway
        if gateway is None or not gateway.serves(engine):
            return
        gate = gateway.gateway.bounds.gate
        units = sum(one.encoding for one in engine.exchanges)
        if gate is not None and units > gate:
            self.violate(f"a forward of engine {engine.pid} may have {units} units, not {gate}")

    def send(self, request: Request) -> None:
        """A client sends it to whatever listens."""
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
        """While requests are open the gateway looks at its engines as often as in use, almost."""
        gateway = self.gateway
        if gateway is not None and self.open_requests:
            gateway.look()
            self.scheduler.after(_LOOK, self._look)

    def finished(self, request: Request) -> None:
        """A request has ended, one way or another."""
        self.open_requests -= 1
        self.count(f"ended {request.end}")
        number = request.number
        took = self.scheduler.now - request.sent
        if took > _LONGEST:
            self.violate(f"request {number} took {took:.0f} s")
        if request.poison and len(request.answered_by) > _MOST_DEATHS:
            self.violate(f"request {number} ended {len(request.answered_by)} engines")
        self.trace(f"request {number} {request.end} at {request.answered_by}")
        if request.starts > 1 or request.finals > 1:
            self.violate(f"request {number} was answered {request.finals} times")
        if request.end.isdigit() and (request.starts != 1 or request.finals != 1):
            self.violate(f"request {number}: {request.starts} beginnings and {request.finals} ends")
        allowed = ("200", "429", "503", "422", "403", "left", "lost")
        said = b"".join(request.body)
        more = (request.end == "400" and b"too_many_images" in said) or (
            request.end == "500" and b"simulated" in said
        )
        if request.end not in allowed and not more:
            self.violate(f"request {number} ended with {request.end}: {request.body[:1]!r}")
        if self.open_requests == 0:
            number, gateway = len(self.requests), self.gateway
            self.scheduler.after(_FORGOTTEN, lambda: self._all_given_back(number, gateway))
        if request.end == "200" and request.stream:
            whole = b"".join(request.body)
            if b"[DONE]" not in whole and b'"error"' not in whole:
                self.violate(
                    f"the stream of request {number} ended without end or error: {whole[-200:]!r}"
                )

    def _all_given_back(self, number: int, gateway: SimulatedGatewayThread | None) -> None:
        """With no request open for a while, nothing is held of any engine."""
        if gateway is None or gateway.ended or gateway is not self.gateway:
            return
        if len(self.requests) != number:
            return
        for engine in gateway.gateway.engines:
            reserved = 0 if engine.gate is None else engine.gate.reserved
            held = (engine.units, engine.host_bytes, engine.outstanding, reserved)
            if any(held):
                self.violate(f"engine {engine.name} is held though no request is open: {held}")
        if gateway.gateway.admission.waiting:
            self.violate(f"{gateway.gateway.admission.waiting} wait though no request is open")

    # -- time and ends

    def rest(self, seconds: float) -> None:
        """A supervisor's pause between two looks: ticks in which nothing comes are left out."""
        self.wake.clear()
        here = self.scheduler.process
        mine = [one for one in self.machine.engines.values() if one.owner is here]
        settled = bool(mine) and all(one.listening for one in mine)
        self.wake.wait(_IDLE if settled else _BUSY)
        self.scheduler.sleep(seconds)

    def kill(self, process: Process) -> None:
        """SIGKILL to a turbofit: its files close, its connections break, its engines end."""
        if process.alive:
            self.exits.append("killed")
            self.count("exit killed")
            self.trace(f"turbofit {process.pid} is killed")
            self.scheduler.kill(process)
            # What was not written yet is forgotten with it.
            for times in self.deaths.values():
                times[:] = [at for at in times if at < self.scheduler.now - 1.0]
            for owners in self.planned.values():
                owners.pop(process, None)
            self._closed(process)

    @staticmethod
    def _closed(process: Process) -> None:
        for descriptor in process.descriptors:
            os.close(descriptor)
        process.descriptors.clear()

    # -- NVML beside memory

    def heat(self, uuids: list[str]) -> list[tuple[str, str]]:
        found = []
        for card in self.machine.cards.values():
            if card.uuid in uuids and card.hot:
                found.append((f"hot {card.uuid}", f"{card.uuid} slows down: it is too hot"))
            if card.uuid in uuids and card.ecc:
                found.append((f"ecc {card.uuid}", f"{card.ecc} uncorrectable ECC errors"))
        return found

    # -- turbofit

    def turbofit(self, main: Callable[[], int], *, primary: bool = True) -> Process:
        """Start one; its exit is noted."""
        process = Process(self.new_pid())
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
                self.violate(f"a traceback: {traceback.format_exc(limit=-6)}")
                code = 1
            self.exits.append(code)
            self.trace(f"turbofit {process.pid} exits {code}")
            self.count(f"exit {code}")
            if len(process.threads) > 1:
                self.daemons(process)
            process.alive = False
            for owners in self.planned.values():
                owners.pop(process, None)
            for end in process.ends:
                end()
            if process.descriptors:
                self.violate(f"turbofit left {len(process.descriptors)} files open")
            self._closed(process)

        self.trace(f"turbofit {process.pid} starts")
        self.scheduler.thread(body, process)
        return process

    def daemons(self, process: Process) -> None:
        """Threads that are left at the end: daemons end with it, and hold nothing."""
        self.scheduler.retire(process)

    def close(self) -> None:
        """Remove what is left of it."""
        self.scheduler.discard_threads()
        for loop in self.loops:
            loop.abandon()
        self.loops.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
