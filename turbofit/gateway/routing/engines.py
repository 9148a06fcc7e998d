"""The engines behind the gateway: what each is doing, how it died, and which one is next."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import Gate

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from turbofit.core.json_types import JsonObject
    from turbofit.gateway.limits.gate import Cost

#: Seconds for which an engine is counted on to have a request whose client left: of an answer in
#: one piece LMDeploy notices that only at the next token. A stream that has begun it ends at once.
#: Under: a first token that takes longer. lmdeploy core/chat_runner.py::ChatRunner.collect #ea0f84
LEFT_SECONDS: Final = 10.0

#: Bytes of JSON of the shortest beginning that is worth a detour, and how many are remembered.
_SHORTEST_PREFIX, _REMEMBERED = 2048, 8192
#: A prefix's own engine may have so many requests more than the least busy one.
_DETOUR: Final = 4
#: No process is started again, and takes a request, within so many seconds of its death.
_PAUSE: Final = 1.0
#: Requests whose clients left that an engine remembers.
_LEFT: Final = 64
#: Seconds of `Retry-After` where no start is forecast; and at most: older SDKs obey no more.
_RETRY, _LONGEST_RETRY = 5, 60
_NEVER: Final = float("inf")
#: Seconds from an engine's end to its next start, where that was not seen.
_UNSEEN_PAUSE: Final = 2.0


@dataclass(eq=False)
class Turn:
    """A suspect's turn at an engine.

    ``name``: the fingerprint or the client that is suspected; it has one turn at a time.
    ``alone``: the engine gets nothing new meanwhile. ``longer``: it goes on after the answer began.
    """

    name: str
    alone: bool
    longer: bool


@dataclass(eq=False)
class Present:
    """A request at an engine, as far as a death asks: what, whose, and how far it had come.

    ``fingerprint``: see `deny_file`; None where it has no body, and ends no engine. ``begun``:
    whether a byte of its answer came. ``left_at``: when its client left.
    """

    client: str
    fingerprint: asyncio.Future[str] | None = None
    turn: Turn | None = None
    begun: bool = False
    sent_at: float = float("-inf")
    left_at: float = float("inf")


class InFlight(Protocol):
    """A request at an engine; ``heard_at``: when a byte of its answer last came."""

    heard_at: float
    present: Present

    def abort(self, *, stuck: bool = False) -> None:
        """End it: the engine died, or is stuck in it."""


class Accusation(NamedTuple):
    """What a death says of a request or a client: it had its turn, and its answer had begun."""

    in_turn: bool
    begun: bool


@dataclass(eq=False)
class EngineDeath:
    """The end of one engine's process: who was there, and what was concluded.

    ``suspects`` are clients by the fingerprints of their requests that may be the cause,
    ``accused`` all requests and clients that were there, ``refused`` who was refused for it.
    ``ended``: a supervisor has seen the process end. ``concluding`` is done once all are suspected.
    """

    engine: int
    at: float
    suspects: dict[str, str] = field(default_factory=dict)
    accused: dict[str, Accusation] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    explained: bool = False
    ended: bool = False
    concluding: asyncio.Task[None] | None = None

    def accuse(self, who: str, *, in_turn: bool, begun: bool) -> None:
        """Note a request or a client that was there, beside what is noted of it already."""
        before = self.accused.get(who, Accusation(in_turn=False, begun=False))
        self.accused[who] = Accusation(
            in_turn=in_turn or before.in_turn, begun=begun or before.begun
        )


class RoutedEngine:
    """One engine, by a number unlike that of any other.

    ``share``: how many requests it takes beside the others' shares; ``host_limit``: bytes of host
    memory of images in flight to it, None for any.
    """

    def __init__(
        self,
        index: int,
        url: str,
        share: float = 1.0,
        *,
        key: str | None = None,
        gate: Gate | None = None,
        host_limit: int | None = None,
    ) -> None:
        self.index, self.url, self.key, self.share = index, url.rstrip("/"), key, share
        self.gate, self.host_limit = gate or Gate(), host_limit
        #: Requests and bytes of images that it has.
        self.outstanding = self.host_bytes = 0
        #: Whether it answers, and so gets requests; one that was never asked is taken to answer.
        self.up = True
        #: Failed probes in a row, and when the engine first failed to answer one.
        self.failures, self.failed_at = 0, float("inf")
        self.model: str | None = None
        #: When a completion last brought a byte, and when anything last did.
        self.last_success, self.heard_at = float("-inf"), time.monotonic()
        #: When it was last asked for a token.
        self.last_check = float("-inf")
        #: Something failed: probe soon.
        self.suspect = True
        #: Whether the monitor asked it for a token since it last brought one.
        self.check_open = False
        #: When its supervisor, which sees no sign of life, ends it.
        self.ends_at = _NEVER
        #: What it has, in the order in which it came.
        self.in_flight: dict[InFlight, None] = {}
        #: Requests that it seemed to be stuck in at the last look, and when that was.
        self.doubtful: set[InFlight] = set()
        self.last_examined = float("-inf")
        #: Tokens that it counted when a question last failed.
        self.tokens: float | None = None
        #: Whose turn it is, see `deny_list`.
        self.turn_of: Turn | None = None
        #: Its last death, and when that was: no answer before counts.
        self.death: EngineDeath | None = None
        self.died_at = float("-inf")
        #: Seconds from its last death until it answered again, or that its start took; 0: unknown.
        self.start_seconds = 0.0
        #: Whether its supervisor let it rest since its death: that is no part of a start.
        self.rested = False
        #: Requests whose clients went away.
        self.left: deque[Present] = deque(maxlen=_LEFT)

    @property
    def units(self) -> int:
        return self.gate.counted

    @property
    def owes(self) -> bool:
        """Whether somebody waits for it: clients, or the monitor."""
        return self.outstanding > 0 or self.check_open

    @property
    def back_at(self) -> float:
        """When it is expected to answer again, by its last start; infinity where nobody knows.

        Under: a start that takes longer than the last one.
        """
        if not self.start_seconds:
            return _NEVER
        dead = self.death is not None and not self.answered
        ends_at = self.died_at if dead else self.ends_at
        return ends_at + self.start_seconds + _UNSEEN_PAUSE

    @property
    def serves(self) -> bool:
        """Whether it takes requests, and has answered one since it died."""
        return self.up and self.answered

    @property
    def answered(self) -> bool:
        """Whether it has answered a request since it last died."""
        return self.last_success > self.died_at

    def dead_since(self, moment: float) -> bool:
        return self.death is not None and self.died_at >= moment and not self.answered

    @property
    def rank(self) -> tuple[float, float, int]:
        """How full one more request would make it for its share, then its units: the least first.

        An engine of twice the share gets twice the requests.
        """
        return (self.outstanding + 1) / self.share, self.units / self.share, self.index

    def fits(self, cost: Cost, turn: Turn | None = None) -> bool:
        """Whether it takes requests, and has room for this one beside those it has."""
        if not self.up or not self.gate.fits(cost):
            return False
        if self.turn_of is not None and (turn is not None or self.turn_of.alone):
            return False
        most = self.host_limit
        return not cost.host_bytes or most is None or self.host_bytes + cost.host_bytes <= most

    def holds(self, cost: Cost) -> bool:
        """Whether it holds a request where it has no other."""
        units, host_limit = self.gate.units, self.host_limit
        return (units is None or cost.units <= units) and (
            host_limit is None or cost.host_bytes <= host_limit
        )

    def succeeded(self) -> None:
        """A completion brought a byte."""
        now = time.monotonic()
        if self.death is not None and not self.answered and not self.rested:
            self.start_seconds = now - self.died_at
        self.rested = False
        self.last_success = self.heard_at = now
        self.failures, self.failed_at = 0, float("inf")
        self.suspect = self.check_open = False
        self.ends_at = _NEVER

    def heard(self) -> None:
        self.heard_at = time.monotonic()

    def note_death(self, sent_at: float = float("-inf")) -> EngineDeath:
        """Note that the engine died or was given up; all requests that were there get one death.

        What answers after a death, or takes a request later, is another process, whose death is
        another one. ``sent_at`` is when the request began that broke off there.
        """
        if self.death is None or max(self.last_success, sent_at - _PAUSE) > self.died_at:
            self.death = EngineDeath(self.index, time.monotonic())
            self.died_at = self.death.at
        return self.death

    def note_end(self) -> EngineDeath:
        """A supervisor saw its process end: the death that requests may have met already."""
        if self.death is not None and self.death.ended:
            self.death = None  # of the process before
        death = self.note_death()
        death.ended = True
        return death

    def left_lately(self) -> list[Present]:
        """Requests that it may have though their clients left: now, or when it failed to answer."""
        at = min(time.monotonic(), self.failed_at)
        return [present for present in self.left if at - present.left_at < LEFT_SECONDS]

    def abort_all(self) -> None:
        for request in tuple(self.in_flight):
            request.abort()


class Outage(NamedTuple):
    """No engine will be up for a while, as its supervisor knows.

    ``reason`` is one clause for people; ``until``, by the ``clock``, is when the first engine is
    started again.
    """

    reason: str
    until: float
    clock: Callable[[], float]

    @property
    def seconds_left(self) -> int:
        return max(1, ceil(self.until - self.clock()))

    @property
    def message(self) -> str:
        return f"{self.reason}; the next start is in {self.seconds_left} s"


class Fleet:
    """All engines of a gateway, dead ones too; iterate over it for them."""

    def __init__(self, engines: Sequence[RoutedEngine]) -> None:
        self.engines = tuple(engines)
        #: Whether any has a gate: texts hold something there too.
        self.gated = any(engine.gate.units is not None for engine in engines)
        #: Why none will be up for a while, where that is known.
        self.outage: Outage | None = None
        #: The engine whose cache has a beginning, by its hash; the newest last.
        self._homes: OrderedDict[bytes, RoutedEngine] = OrderedDict()

    def __iter__(self) -> Iterator[RoutedEngine]:
        return iter(self.engines)

    def __len__(self) -> int:
        return len(self.engines)

    @property
    def open(self) -> int:
        """How many take requests."""
        return sum(engine.up for engine in self.engines)

    @property
    def turns(self) -> set[str]:
        return {engine.turn_of.name for engine in self.engines if engine.turn_of is not None}

    @property
    def turns_left(self) -> bool:
        return any(engine.up and engine.turn_of is None for engine in self.engines)

    @property
    def retry_seconds(self) -> int:
        """Seconds after which to ask again where none serves: the first engine's next start."""
        if self.outage is not None:
            return self.outage.seconds_left
        now = time.monotonic()
        left = [engine.back_at - now for engine in self.engines if now < engine.back_at < _NEVER]
        return min(*map(ceil, left), _LONGEST_RETRY) if left else _RETRY

    def best(
        self, cost: Cost, turn: Turn | None = None, prefixes: Sequence[bytes] = ()
    ) -> RoutedEngine | None:
        """The least busy engine that has room for so much, and for a turn; None where none has.

        The engine of the longest prefix that is known goes first, if it is not much busier.
        """
        fitting = [engine for engine in self.engines if engine.fits(cost, turn)]
        best = min(fitting, key=lambda engine: engine.rank, default=None)
        if best is None or not prefixes:
            return best
        for prefix in reversed(prefixes):
            home = self._homes.get(prefix)
            if home in fitting and home.outstanding <= best.outstanding + _DETOUR:
                best = home
                break
        for prefix in prefixes:
            self._homes[prefix] = best
            self._homes.move_to_end(prefix)
        while len(self._homes) > _REMEMBERED:
            self._homes.popitem(last=False)
        return best

    def dead(self) -> Refusal:
        """What clients are told while no engine is up."""
        if self.outage is None:
            return Refusal("engine_unavailable", retry_after=self.retry_seconds)
        return Refusal("engine_resting", why=self.outage.message, retry_after=self.retry_seconds)


def prefixes_of(body: JsonObject) -> list[bytes]:
    """Hashes of a request up to each message, the short ones left out."""
    state = blake2b(digest_size=16)
    hashes, length = [], 0
    messages = body.get("messages")
    parts = messages if isinstance(messages, list) else [body.get("prompt")]
    for part in (body.get("system"), body.get("tools"), *parts):
        data = msgspec.json.encode(part)
        state.update(data)
        length += len(data)
        if length >= _SHORTEST_PREFIX:
            hashes.append(state.copy().digest())
    return hashes
