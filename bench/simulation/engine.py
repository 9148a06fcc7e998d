"""A simulated inference engine: takes memory as the plan's ledger says, prints what LMDeploy's
engines print, answers HTTP, and dies as they die. The process that turbofit starts is one of these
(`engine_process.py`).
"""

from __future__ import annotations

import signal
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from heapq import nlargest
from math import inf
from typing import TYPE_CHECKING, Any

import msgspec

from bench.simulation.engine_log import PytorchLog, TurboMindLog
from bench.simulation.engine_memory import EngineMemory
from bench.simulation.machine import OutOfDeviceMemory
from bench.simulation.scheduler import Event

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.simulation.clients import Request
    from bench.simulation.scheduler import Process
    from bench.simulation.world import World
    from turbofit.core.plan import Plan

__all__ = ["Exchange", "SimulatedEngine", "StartFault"]

#: Longer than turbofit waits for the last words of a loop that has ended.
_LAST_WORDS = 2.5
_UNAVAILABLE = "The inference engine is unavailable."
#: Tokens of a request beside its images.
_TEXT = 100
#: The same of a question that turbofit asks by itself, with its answer of one token.
_QUESTION = 640


@dataclass
class StartFault:
    """What is to become of one start.

    ``dies`` names a phase (starting, weights, cache, warm-up) and ``how`` (kill, cuda, python,
    host). ``stuck``: a phase that never ends. ``slow``: seconds more. ``more``: bytes that the
    engine takes beyond its forecast, in ``more_at`` (weights, serving). ``floods``: its warm-up
    waits for cache for ever.
    """

    dies: str = ""
    how: str = "cuda"
    stuck: str = ""
    slow: float = 0.0
    more: int = 0
    more_at: str = "serving"
    floods: bool = False


class _Ended(Exception):  # noqa: N818 - no error: its life is over
    pass


class Exchange:
    """One request at an engine."""

    def __init__(
        self, engine: SimulatedEngine, answer: Callable[[str, Any], None],
        request: Request | None, *, posted: bool,
    ) -> None:  # fmt: skip
        self.engine, self.answer, self.request, self.posted = engine, answer, request, posted
        self.open = True
        #: Vision units, and those that the next forward may encode.
        self.units = self.encoding = 0
        #: Tokens that it may come to hold of the cache.
        self.tokens = 0
        #: Whether its answer has begun; all of it is made; who asked is gone.
        self.begun = self.made = self.gone = False

    def left(self) -> None:
        """Who asked is gone: of an answer in one piece LMDeploy notices that at the next token."""
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


def _size(url: str) -> tuple[int, int]:
    """Pixels of a PNG, by its header."""
    header = b64decode(url.partition(",")[2][:32])
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


class SimulatedEngine:
    """What runs in the process."""

    def __init__(
        self, world: World, pid: int, argv: Sequence[str], env: Mapping[str, str], fault: StartFault
    ) -> None:
        self.world, self.pid, self.fault = world, pid, fault
        self.argv = list(argv)
        self.gpus = [int(one) for one in env["CUDA_VISIBLE_DEVICES"].split(",")]
        self.port = int(self._option("--server-port"))
        self.ratio = float(self._option("--cache-max-entry-count"))
        self.plan: Plan
        self.planned_at, self.plan = world.plan_of(self.gpus, self.ratio)
        self.code: int | None = None
        self.owner: Process | None = None
        self.listening = False
        self._hung = False
        #: What was due while it hung: since when, whose, and what.
        self._stalled: list[tuple[float, Exchange, Callable[[], None]]] = []
        #: Completions are answered with 500 while its health page is fine.
        self.failing = False
        #: The PyTorch engine's loop has ended: its server answers 503 for ever.
        self.loop_ended = False
        #: Since when it answers what it is sent, and when it was last sent a client's request.
        self.well_since, self.asked_at = inf, 0.0
        self.connections: list[Any] = []
        self.exchanges: list[Exchange] = []
        #: Resets the connections that are being made.
        self.connecting: list[Callable[[], None]] = []
        #: When a client's request was last left, and which.
        self.last_left: tuple[float, Request] | None = None
        self.said: deque[tuple[str, int]] = deque()
        self.changed = Event(world.scheduler)
        #: Bytes of each card that its cache holds beyond the plan.
        self.surplus = 0
        self._memory = EngineMemory(self)
        #: Whether an error while it serves ends its loop alone; the server lives on.
        self._pytorch = self.plan.engine.is_pytorch
        self._log = (PytorchLog if self._pytorch else TurboMindLog)(self._print)
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
        except StopIteration:
            return
        except _Ended:
            return
        except OutOfDeviceMemory:
            self._out_of_memory()
            return
        if pause is not None:
            self._next(pause)

    def _live(self) -> Iterator[float | None]:
        rng, log = self.world.rng, self._log
        yield 2.0 + rng.random() * 8
        self._meet("starting")
        if self.fault.stuck == "starting":
            yield None
        self._memory.take("context")
        log.context()
        yield 5.0 + self.fault.slow
        self._meet("weights")
        if self.fault.stuck == "weights":
            yield None
        self._memory.take("weights", self._memory.loading())
        yield 10.0 + rng.random() * 20
        self._memory.give_loading()
        self._meet("cache")
        free = min(self.world.machine.cards[index].free for index in self.gpus)
        free = max(0, free - self._memory.withheld())
        budget = int(free * self.ratio)
        self.surplus = max(0, budget - self.plan.kv.region_bytes)
        self.world.invariants.cache_sized(self)
        for index in self.gpus:
            self.world.machine.allocate(index, self.pid, budget)
        log.cache(free, budget, self.ratio)
        self._memory.take("buffers")
        yield 1.0
        log.warming()
        if self.fault.floods and not self._pytorch:
            while True:
                self.said.append(("[TM][INFO][scheduler.cc:1186] out of memory at 0/1", 3600))
                self._tell()
                yield 0.5
        if self.fault.stuck == "warm-up":
            yield None
        self._meet("warm-up")
        yield 3.0
        log.warm()
        if self.world.machine.ports.get(self.port, self) is not self or (
            self.port in self.world.machine.ports
        ):
            self._print("OSError: [Errno 98] error while attempting to bind on address")
            self._exit(1)
            return
        self.world.machine.ports[self.port] = self
        self.listening, ill = True, self.hung or self.failing
        self.well_since = inf if ill else self.world.scheduler.now
        for probe in self.world.probes:
            probe.poke()
        yield None

    def _meet(self, phase: str) -> None:
        """Die here, if it is to be."""
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
        self._log.out_of_memory(serving=self.listening)
        self._fail()

    def _fail(self) -> None:
        """It ends of an error: the process, or of a PyTorch engine that serves the loop."""
        if not self._pytorch:
            self._exit(-signal.SIGABRT)
        elif not self.listening:
            self._exit(1)
        elif not self.loop_ended:
            self.loop_ended, self.well_since = True, inf
            # Who follows its log waits for its last words.
            self.world.scheduler.after(_LAST_WORDS, self._tell)
            # Each request looks every second whether the loop is alive.
            for one in [one for one in self.exchanges if not one.made]:
                self.world.scheduler.after(self.world.rng.random(), partial(self._unavailable, one))

    def _unavailable(self, one: Exchange) -> None:
        """What LMDeploy answers once its engine's loop has ended."""
        if self.code is not None or not one.open:
            return
        error = {"message": _UNAVAILABLE, "type": "server_error", "code": 503, "param": None}
        if one.begun:
            event = msgspec.json.encode({"error": {**error, "object": "error"}})
            one.answer("data", b"data: " + event + b"\n\ndata: [DONE]\n\n")
            self._close(one)
        else:
            self._whole(one, 503, {**error, "object": "error"})

    def _exit(self, code: int) -> None:
        if self.code is not None:
            return
        self.code = code
        machine = self.world.machine
        machine.release(self.pid)
        if machine.ports.get(self.port) is self:
            del machine.ports[self.port]
        self.listening = False
        connecting, self.connecting = self.connecting, []
        for reset in connecting:
            reset()
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
        """A signal that ends it."""
        self._exit(-number)

    def crash(self) -> None:
        """A CUDA error that is not memory."""
        if self.code is None and not self.loop_ended:
            self._log.cuda_error()
            self._fail()

    def _die_of(self, killing: Exchange) -> None:
        """A request ends it, unless its answer is there already."""
        request = killing.request
        if self.code is not None or self.loop_ended or killing.made:
            return
        assert request is not None
        here = [one.request for one in self.exchanges if one.request is not None]
        # Of two that would have ended it nobody knows which one did.
        if {one.text for one in here if one.poison} <= {request.text}:
            self.world.invariants.ended_by(request, self)
        self.crash()

    # -- its service

    def take(
        self, method: str, path: str, body: bytes, answer: Callable[[str, Any], None]
    ) -> Exchange:
        """A request came."""
        request = self.world.request_in(body)
        one = Exchange(self, answer, request, posted=method == "POST")
        self.exchanges.append(one)
        if request is not None:
            self.asked_at = self.world.scheduler.now
            self.world.invariants.arrived(self, request)
            if request.poison and not self.failing and not self.loop_ended:
                self.world.scheduler.after(request.ends_after, lambda: self._die_of(one))
        if method == "GET":
            page = {"data": [{"id": "m"}]} if path == "/v1/models" else {}
            self._after(one, 0.001, lambda: self._whole(one, 200, page))
        elif self.loop_ended:
            self.world.scheduler.after(1.0, partial(self._unavailable, one))
        elif self.failing:
            self._after(one, 0.01, lambda: self._whole(one, 500, {"error": "simulated"}))
        else:
            units = self._sent_units(request, body)
            one.units = one.encoding = units
            one.tokens = self._may_hold(request)
            self._evict()
            if request is not None:
                self.world.invariants.holds(self)
            seconds = units / (self.plan.limits.units_per_request or 1)
            if self.world.network.early and request is not None and request.stream:
                self._after(one, 0.001, lambda: self._head(one))
            self._after(one, 0.05 + seconds, lambda: self._begin(one))
        return one

    def _head(self, one: Exchange) -> None:
        """A stream begins."""
        if not one.begun:
            one.begun = True
            one.answer("head", (200, "text/event-stream"))

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
        self._evict()
        request = one.request
        if request is not None and request.stream:
            self._head(one)
            self._stream(one, request.tokens)
        else:
            tokens = request.tokens if request is not None else 1
            page = {"choices": [{"text": "ok"}], "usage": {"prompt_tokens": 9}}
            self._after(one, 0.02 * tokens, lambda: self._made(one, page))

    def _made(self, one: Exchange, page: Any) -> None:
        """An answer in one piece is there; what turbofit itself asks has its answer at once."""
        one.made, pause = True, self.world.network.pause
        if not pause or one.request is None:
            self._whole(one, 200, page)
            return
        one.begun = True
        one.answer("head", (200, "application/json"))
        self._after(one, pause, lambda: one.answer("data", msgspec.json.encode(page)))
        self._after(one, 2 * pause, lambda: self._close(one))

    def _close(self, one: Exchange) -> None:
        """The end of an answer."""
        one.answer("end", None)
        one.end()

    def _sent_units(self, request: Request | None, body: bytes) -> int:
        """Vision units of the images as they were sent: the gateway may have lowered them."""
        rule, limit = self.plan.model.image_rule, self.plan.limits.image_limit
        ours = request is None and self.world.calibrates  # turbofit's own worst cases
        if not (ours or (request is not None and request.images)) or rule is None or limit is None:
            return 0
        messages = msgspec.json.decode(body).get("messages") or [{"content": ()}]
        parts = [part for part in messages[0]["content"] if isinstance(part, dict)]
        sent = [part["image_url"] for part in parts if part["type"] == "image_url"]
        sizes = [_size(one["url"]) for one in sent] if request is None else request.images
        return sum(
            rule.units(*size, image.get(rule.limit_name, limit))
            for size, image in zip(sizes, sent, strict=True)
        )

    def _may_hold(self, request: Request | None) -> int:
        """Tokens of a request: its images, a short text, and the answer that it states."""
        most = self.plan.settings.session_len
        if request is None:
            return min(most, _QUESTION)
        if not request.stated:
            return most
        rule = self.plan.model.image_rule
        images = rule.unit_tokens(request.units) if rule is not None else 0
        return min(most, images + _TEXT + request.tokens)

    def _evict(self) -> None:
        """The worst that may happen where the cache may run out: all who run are evicted, and
        their images are encoded again with whatever comes. Who waits for a place in the batch
        holds nothing of the cache."""
        tokens, most = [one.tokens for one in self.exchanges], self.plan.kv.tokens
        if sum(tokens) > most < sum(nlargest(self.plan.settings.max_batch_size, tokens)):
            for one in self.exchanges:
                one.encoding = one.units

    def _stream(self, one: Exchange, left: int) -> None:
        if left == 0:
            one.made = True
            one.answer("data", b"data: [DONE]\n\n")
            if self.world.network.pause:
                self._after(one, self.world.network.pause, lambda: self._close(one))
            else:
                self._close(one)
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
        # Of an engine whose loop has ended only its server goes on.
        unmade = one.posted and not one.made
        if self.code is not None or not one.open or (self.loop_ended and unmade):
            return
        if self._hung:
            self._stalled.append((self.world.scheduler.now, one, act))
        else:
            act()

    @property
    def hung(self) -> bool:
        """Whether it does nothing more; what was due goes on within a second of the hang's end.

        Requests whose clients have left do not go on: the gateway counts them for ten seconds only
        (`LEFT_SECONDS` of `gateway.routing.suspects`, which says the sign: under).
        """
        return self._hung

    @hung.setter
    def hung(self, hung: bool) -> None:
        self._hung = hung
        if hung:
            for one in [one for one in self.exchanges if one.gone]:
                one.end()
            return
        stalled, self._stalled = self._stalled, []
        for since, one, act in stalled:
            when = since
            while when < self.world.scheduler.now:
                when += 1.0
            self.world.scheduler.at(when, partial(self._go_on, one, act))

    # -- its words

    def _print(self, text: str) -> None:
        self.said.append((text, 1))
        self._tell()

    def _tell(self) -> None:
        """Whoever follows it looks at it soon."""
        self.changed.set()
        self.world.stir(self.owner)

    def _option(self, name: str) -> str:
        return self.argv[self.argv.index(name) + 1]
