"""A simulated inference engine, in place of the process that turbofit starts.

It takes memory as the plan's ledger says, prints what LMDeploy's engines print, answers HTTP, and
dies as they do. turbofit holds it as a `SimulatedEngineProcess`.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bench.simulation.machine import OutOfDeviceMemory
from bench.simulation.scheduler import Event
from tests.support.standin.standin_engine import STARTING, budget_line, lengths_line, slab_line
from turbofit.core.messages import FIRST_TOKENS
from turbofit.memory.calibrated import BUFFERS, CONTEXT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.simulation.clients import Request
    from bench.simulation.scheduler import Process
    from bench.simulation.world import World
    from turbofit.core.plan import GpuLedger, Plan


@dataclass
class StartFault:
    """The fault of one start of an engine, if any.

    ``dies`` names a phase (starting, weights, cache, warm-up) and ``how`` (kill, cuda, python,
    host). ``stuck``: a phase that never ends. ``slow``: additional seconds. ``more``: bytes that
    the engine takes beyond its forecast, in ``more_at`` (weights, serving).
    """

    dies: str = ""
    how: str = "cuda"
    stuck: str = ""
    slow: float = 0.0
    more: int = 0
    more_at: str = "serving"


_MIB = 1 << 20
_SLAB = 32 * _MIB
#: Seconds between looks of a supervisor at an engine that hangs.
_HUNG_LOOK = 15.0
#: Terms without an allocation: the pool's term, since the pool grows by itself, and calibrations.
_NOT = ("pool_warmup", CONTEXT, BUFFERS)


class EngineMemory:
    """Allocates and frees the bytes of one engine.

    Args:
        engine: the engine that holds them.
    """

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine, self._machine = engine, engine.world.machine
        #: By card, the most that the executor's pool ever took, and what only loading takes.
        self._pools = dict.fromkeys(engine.gpus, 0)
        self._extra: dict[int, int] = {}

    def _ledgers(self) -> list[GpuLedger]:
        return list(self._engine.planned.ledgers)

    def take(self, phase: str) -> None:
        """Allocate a phase's bytes by the ledger; for weights also what only loading takes."""
        fault = self._engine.fault
        for gpu in self._ledgers():
            size = sum(t.bytes for t in gpu.terms if t.phase == phase and t.term not in _NOT)
            if phase == "weights":
                there = gpu.bytes_in("before", "context", "weights")
                self._extra[gpu.index] = max(0, gpu.load_peak - there)
                size += self._extra[gpu.index] + fault.more * (fault.more_at == "weights")
            self._machine.allocate(gpu.index, self._engine.pid, max(0, size))
            if phase == "buffers":
                self._pool(gpu.index, gpu.bytes_of("pool_warmup"))

    def give_loading(self) -> None:
        for index, size in self._extra.items():
            self._machine.allocate(index, self._engine.pid, -size)

    def _pool(self, index: int, need: int) -> None:
        """Grow the executor's pool to ``need`` bytes; it never shrinks."""
        if need > self._pools[index]:
            self._machine.allocate(index, self._engine.pid, need - self._pools[index])
            self._pools[index] = need

    def work(self, units: int) -> None:
        """Grow the pool for a forward over ``units`` vision units.

        Raises:
            OutOfDeviceMemory: the card has too little free memory.
        """
        most = (
            self._engine.planned.units_per_forward
            or self._engine.plan.promise.limits.units_per_request
            or 1
        )
        for gpu in self._ledgers():
            # peak is the pool at its fullest; three eighths of it for a text.
            whole = max(0, gpu.peak - gpu.steady) + gpu.bytes_of("pool_warmup")
            # In eighths, as a pool grows by blocks: fewer machines that differ by a few bytes.
            part = min(1.0, ceil(8 * units / most) / 8) if units else 0.375
            need = int(whole * part)
            if self._engine.fault.more_at == "serving" and units:
                need += self._engine.fault.more
            self._pool(gpu.index, need)


class SimulatedEngineProcess:
    """The handle of an engine that turbofit started; its log can always be opened."""

    log_error = ""

    def __init__(
        self, world: World, argv: Sequence[str], env: Mapping[str, str], log: Path, *_: object,
        **__: object,
    ) -> None:  # fmt: skip
        self.log = log
        self._world = world
        self.pid = world.new_pid()
        self._engine = world.start_engine(self.pid, argv, env)

    def poll(self) -> int | None:
        return self._engine.code

    def take(self) -> list[tuple[str, int]]:
        said = list(self._engine.said)
        self._engine.said.clear()
        return said

    def finish(self, seconds: float = 2.0) -> list[tuple[str, int]]:  # noqa: ARG002
        return self.take()

    def send(self, number: int) -> None:
        """Send a signal, which ends the engine half a second later, unless it hangs."""
        engine = self._engine
        if engine.code is not None or engine.hung:
            return
        self._world.scheduler.after(0.5, lambda: engine.kill(number))

    def wait(self, seconds: float) -> None:
        scheduler = self._world.scheduler
        deadline = scheduler.now + max(0.0, seconds)
        while self._engine.code is None and scheduler.now < deadline:
            self._engine.changed.clear()
            scheduler.wait(self._engine.changed, deadline - scheduler.now)

    def kill_group(self) -> None:
        self._engine.kill()

    def kill(self, seconds: float) -> bool:  # noqa: ARG002
        self._engine.kill()
        return True


class _Ended(Exception):  # noqa: N818 - no error: its life is over
    pass


class Exchange:
    """A request that an engine works on."""

    def __init__(
        self, engine: SimulatedEngine, answer: Callable[[str, Any], None],
        request: Request | None, name: str = "",
    ) -> None:  # fmt: skip
        self.engine, self.answer, self.request, self.name = engine, answer, request, name
        self.open = True
        #: Vision units; vision units that the next forward may encode.
        self.units = self.encoding = 0
        #: Whether all of its answer is made; who asked is gone.
        self.made = self.gone = False

    def left(self) -> None:
        """Note that the client is gone; without a stream LMDeploy sees it at the next token."""
        if self.request is not None:
            self.engine.last_left = (self.engine.world.scheduler.now, self.request)
        whole = self.request is not None and not self.request.stream
        if whole and self.encoding and not self.engine.hung:
            self.gone = True
        else:
            self.end()

    def end(self) -> None:
        if self.open:
            self.open = False
            self.engine.exchanges.remove(self)


class SimulatedEngine:
    """The engine that runs in the simulated process."""

    def __init__(
        self, world: World, pid: int, argv: Sequence[str], env: Mapping[str, str], fault: StartFault
    ) -> None:
        self.world, self.pid, self.fault = world, pid, fault
        self.argv = list(argv)
        self.gpus = [int(one) for one in env["CUDA_VISIBLE_DEVICES"].split(",")]
        self.port = int(self._option("--server-port"))
        self.ratio = float(self._option("--cache-max-entry-count"))
        self.plan: Plan
        self.planned_at, self.plan, self.planned = world.plan_of(self.gpus, self.ratio)
        self.code: int | None = None
        self.owner: Process | None = None
        self.listening = False
        self._hung = False
        #: What was due while it hung: whose, and what.
        self._stalled: list[tuple[Exchange, Callable[[], None]]] = []
        #: Completions are answered with 500 while its health page is fine.
        self.failing = False
        self.connections: list[Any] = []
        self.exchanges: list[Exchange] = []
        #: Readers of its page of first tokens.
        self.pages: list[Exchange] = []
        #: When a client's request was last left, and which.
        self.last_left: tuple[float, Request] | None = None
        self.said: deque[tuple[str, int]] = deque()
        self.changed = Event(world.scheduler)
        #: Bytes of each card that its cache holds beyond the plan.
        self.surplus = 0
        self._memory = EngineMemory(self)
        world.machine.engines[pid] = self
        world.machine.names[pid] = "lmdeploy"
        self._life = self._live()
        self._next(0.0)

    # -- its life

    def _next(self, seconds: float) -> None:
        self.world.scheduler.after(seconds, self._step)

    def _step(self) -> None:
        if self.code is not None:
            return
        try:
            pause = next(self._life)
        except (StopIteration, _Ended):
            return
        except OutOfDeviceMemory:
            self._out_of_memory()
            return
        if pause is not None:
            self._next(pause)

    def _live(self) -> Iterator[float | None]:
        rng, say = self.world.rng, self._say
        yield 2.0 + rng.random() * 8
        self._meet("starting")
        if self.fault.stuck == "starting":
            yield None
        self._memory.take("context")
        say(STARTING, "WARN")
        yield 5.0 + self.fault.slow
        self._meet("weights")
        if self.fault.stuck == "weights":
            yield None
        self._memory.take("weights")
        yield 10.0 + rng.random() * 20
        self._memory.give_loading()
        self._meet("cache")
        free = min(self.world.machine.cards[index].free for index in self.gpus)
        budget = int(free * self.ratio)
        self.surplus = max(0, budget - self.planned.kv.region_bytes)
        for index in self.gpus:
            self.world.machine.allocate(index, self.pid, budget)
        say(budget_line(free / _MIB, self.ratio))
        say(slab_line(max(1, budget // _SLAB)), "WARN")
        self._memory.take("buffers")
        yield 1.0
        say(lengths_line(4096))
        say("8")
        if self.fault.stuck == "warm-up":
            yield None
        self._meet("warm-up")
        yield 3.0
        say("Warm-up finished in 3.00 seconds.")
        self.world.machine.ports[self.port] = self
        self.listening = True
        for probe in self.world.probes:
            probe.poke()
        yield None

    def _meet(self, phase: str) -> None:
        """End the engine if its fault names this phase."""
        if self.fault.dies != phase:
            return
        if self.fault.how == "kill":
            self._exit(-signal.SIGKILL)
        elif self.fault.how == "host":
            self.world.machine.host_kills += 1
            self._exit(-signal.SIGKILL)
        elif self.fault.how == "python":
            self._print("RuntimeError: simulated")
            self._exit(1)
        else:
            self._out_of_memory()
        raise _Ended

    def _out_of_memory(self) -> None:
        self._say("CUDA error: out of memory", "FATAL")
        where = "InternVit::Impl::Forward" if self.listening else "LlamaLinear::Forward"
        self._print("*** stacktrace of thread 0x7f0 ***")
        self._print(f"  [ 0] {where} @ src/turbomind/x.cc:12")
        self._exit(-signal.SIGABRT)

    def _exit(self, code: int) -> None:
        if self.code is not None:
            return
        self.code = code
        machine = self.world.machine
        machine.release(self.pid)
        if machine.ports.get(self.port) is self:
            del machine.ports[self.port]
        self.listening = False
        for one in list(self.exchanges):
            one.open = False
            one.answer("lost", None)
        self.exchanges.clear()
        connections, self.connections = self.connections, []
        for connection in connections:
            connection.reset()
        machine.engines.pop(self.pid, None)
        self.world.trace(f"engine {self.pid} ends {code}")
        self._tell()
        self.world.count("engine ends")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the engine by a signal."""
        self._exit(-number)

    def crash(self) -> None:
        """End the engine by a CUDA error that is no lack of memory."""
        if self.code is None:
            self._say("CUDA error: an illegal memory access was encountered", "FATAL")
            self._exit(-signal.SIGABRT)

    def _die_of(self, killing: Exchange) -> None:
        """End the engine by a poisonous request, unless its answer is already made."""
        request = killing.request
        if self.code is not None or killing.made:
            return
        assert request is not None
        here = [one.request for one in self.exchanges if one.request is not None]
        # Of two that would have ended it nobody knows which one did.
        if {one.text for one in here if one.poison} <= {request.text}:
            self.world.invariants.ended_by(request)
        self.crash()

    # -- its service

    def take(
        self, method: str, path: str, body: bytes, answer: Callable[[str, Any], None],
        name: str = "",
    ) -> Exchange:  # fmt: skip
        """Begin to work on a request that arrived; the page of first tokens tells its ``name``."""
        request = self.world.request_in(body)
        one = Exchange(self, answer, request, name)
        self.exchanges.append(one)
        if path == FIRST_TOKENS:
            self.pages.append(one)
            one.answer("head", (200, "text/plain"))
            return one
        if request is not None:
            self.world.invariants.arrived(self, request)
            if request.poison and not self.failing:
                self.world.scheduler.after(request.ends_after, lambda: self._die_of(one))
        if method == "GET":
            page = {"data": [{"id": "m"}]} if path == "/v1/models" else {}
            self._after(one, 0.001, lambda: self._whole(one, 200, page))
        elif self.failing:
            self._after(one, 0.01, lambda: self._whole(one, 500, {"error": "simulated"}))
        else:
            units = 0 if request is None else request.units
            one.units = one.encoding = units
            if request is not None:
                self.world.invariants.holds(self)
            seconds = units / (self.plan.promise.limits.units_per_request or 1)
            self._after(one, 0.05 + seconds, lambda: self._begin(one))
        return one

    def _begin(self, one: Exchange) -> None:
        try:
            self._memory.work(sum(other.encoding for other in self.exchanges))
        except OutOfDeviceMemory:
            self.world.invariants.out_of_memory(self)
            self._out_of_memory()
            return
        if one.gone:
            one.end()
            return
        one.encoding = 0
        for page in [page for page in self.pages if page.open]:
            page.answer("data", f"{one.name} 600\n".encode())
        request = one.request
        if request is not None and request.stream:
            one.answer("head", (200, "text/event-stream"))
            self._stream(one, request.tokens)
        else:
            tokens = request.tokens if request is not None else 1
            page = {"choices": [{"text": "ok"}], "usage": {"prompt_tokens": 9}}
            self._after(one, 0.4 * tokens, lambda: self._made(one, page))

    def _made(self, one: Exchange, page: Any) -> None:
        """Send an answer in one piece, which is now made."""
        one.made = True
        self._whole(one, 200, page)

    def _stream(self, one: Exchange, left: int) -> None:
        if left == 0:
            one.made = True
            one.answer("data", b"data: [DONE]\n\n")
            one.answer("end", None)
            one.end()
            return
        one.answer("data", b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
        # Bursts: a token of a day costs as much of the simulation's time as one of a second.
        self._after(one, 0.4, lambda: self._stream(one, left - 1))

    def _whole(self, one: Exchange, status: int, page: Any) -> None:
        one.answer("whole", (status, msgspec.json.encode(page)))
        one.end()

    def _after(self, one: Exchange, seconds: float, act: Callable[[], None]) -> None:
        self.world.scheduler.after(seconds, partial(self._go_on, one, act))

    def _go_on(self, one: Exchange, act: Callable[[], None]) -> None:
        if self.code is not None or not one.open:
            return
        if self._hung:
            self._stalled.append((one, act))
        else:
            act()

    @property
    def hung(self) -> bool:
        """Whether the engine hangs; work that was due goes on a second after the hang's end.

        Requests whose clients have left do not go on: the gateway counts them for ten seconds only
        (`LEFT_SECONDS` of `gateway.routing.engines`, which says the sign: under).
        """
        return self._hung

    @hung.setter
    def hung(self, hung: bool) -> None:
        self._hung = hung
        if hung:
            for one in [one for one in self.exchanges if one.gone]:
                one.end()
            self._give_no_sign()
            return
        stalled, self._stalled = self._stalled, []
        for one, act in stalled:
            self._after(one, 1.0, act)

    def _give_no_sign(self) -> None:
        """Wake the engine's supervisor from time to time while the engine hangs."""
        if self._hung and self.code is None:
            self.world.stir(self.owner)
            self.world.scheduler.after(_HUNG_LOOK, self._give_no_sign)

    # -- its words

    def _say(self, text: str, level: str = "INFO") -> None:
        """Print a line of TurboMind's log."""
        self._print(f"[TM][{level}][turbomind.cc:305] {text}")

    def _print(self, text: str) -> None:
        self.said.append((text, 1))
        self._tell()

    def _tell(self) -> None:
        """Wake the tasks that wait for the engine."""
        self.changed.set()
        self.world.stir(self.owner)

    def _option(self, name: str) -> str:
        return self.argv[self.argv.index(name) + 1]
