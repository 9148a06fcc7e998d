"""The engines behind the gateway: what each is doing, and which one is next."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from hashlib import blake2b
from math import ceil
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import EngineCapacity, Gate
from turbofit.gateway.routing.suspects import LEFT_SECONDS, EngineDeath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from turbofit.core.json_types import JsonObject
    from turbofit.gateway.limits.gate import Cost
    from turbofit.gateway.routing.suspects import Present, Turn

    #: From the least busy engine that has room, and whether another one has it too.
    Chooser = Callable[["RoutedEngine", Callable[["RoutedEngine"], bool]], "RoutedEngine"]

__all__ = ["Affinity", "Fleet", "InFlight", "Outage", "RoutedEngine", "least_busy"]

#: Prefixes shorter than this many bytes of JSON are not worth a detour.
_SHORTEST_PREFIX: Final = 2048
_REMEMBERED: Final = 8192
#: A prefix's own engine may have so many requests more than the least busy one.
_DETOUR: Final = 4
#: No process is started again, and takes a request, within so many seconds of its death.
_PAUSE: Final = 1.0
#: Requests whose clients left that an engine remembers.
_LEFT: Final = 64
#: Seconds of `Retry-After` where no start is forecast; and at most: older SDKs obey no more.
_RETRY, _LONGEST_RETRY = 5, 60
#: Seconds from an engine's end to its next start, where that was not seen.
_UNSEEN_PAUSE: Final = 2.0


class InFlight(Protocol):
    """A request at an engine: when a byte of its answer last came, and whether one ever did.

    ``present``: None where it has no body.
    """

    heard_at: float
    begun: bool
    present: Present | None

    def abort(self, *, died: bool, stuck: bool = False) -> None:
        """End it: the engine died, or is stuck in it."""


class RoutedEngine:
    """One engine.

    Args:
        index: its number, unlike that of any other.
        url: its address, without a final slash.
        share: how many requests it takes beside the others' shares.
        key: its API key.
        gate: which requests may be there together, None for any.
        host_limit: bytes of host memory of images in flight to it, None for any number.
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
        self.last_success, self.last_byte = float("-inf"), time.monotonic()
        #: When it was last asked for a token.
        self.last_check = float("-inf")
        #: Something failed: probe soon.
        self.suspect = True
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
        """Vision units that it has, see `Gate.counted`."""
        return self.gate.counted

    @property
    def serves(self) -> bool:
        """Whether it takes requests, and has answered one since it died."""
        return self.up and self.answered

    @property
    def answered(self) -> bool:
        """Whether it has answered a request since it last died."""
        return self.last_success > self.died_at

    def dead_since(self, moment: float) -> bool:
        """Whether it has died since a moment, and has not answered again."""
        return self.death is not None and self.died_at >= moment and not self.answered

    @property
    def rank(self) -> tuple[float, float, int]:
        """How full one more request would make it, the smaller the better.

        Full is relative to its share: an engine of twice the share gets twice the requests. Of
        equals the one with the fewest units is next.
        """
        return (self.outstanding + 1) / self.share, self.units / self.share, self.index

    def fits(self, cost: Cost, turn: Turn | None = None) -> bool:
        """Whether it takes requests, and has room for this one beside those it has."""
        return (
            self.up
            and (self.turn_of is None or (turn is None and not self.turn_of.alone))
            and self.gate.fits(cost)
            and (
                not cost.host_bytes
                or self.host_limit is None
                or self.host_bytes + cost.host_bytes <= self.host_limit
            )
        )

    @property
    def capacity(self) -> EngineCapacity:
        """What it holds at most."""
        return EngineCapacity(units=self.gate.units, kv=self.gate.kv, host_bytes=self.host_limit)

    def succeeded(self) -> None:
        """A completion brought its first byte."""
        now = time.monotonic()
        if self.death is not None and not self.answered and not self.rested:
            self.start_seconds = now - self.died_at
        self.rested = False
        self.last_success = self.last_byte = now
        self.failures, self.failed_at = 0, float("inf")
        self.suspect = False

    def heard(self) -> None:
        """A byte came."""
        self.last_byte = time.monotonic()

    def note_death(self, sent_at: float = float("-inf")) -> EngineDeath:
        """It died, or was given up: its death.

        The same one for all who were there, and for who is sent a connection of it that was kept.
        What answers after a death, or takes a request later, is another process, whose death is
        another one.

        Args:
            sent_at: when the request began that broke off there.
        """
        if self.death is None or max(self.last_success, sent_at - _PAUSE) > self.died_at:
            self.death = EngineDeath(self.index, time.monotonic())
            self.died_at = self.death.at
        return self.death

    def note_end(self) -> EngineDeath:
        """A supervisor saw its process end: the death that requests may have met already."""
        if self.death is not None and self.death.seen:
            self.death = None  # of the process before
        death = self.note_death()
        death.seen = True
        return death

    def left_lately(self) -> list[Present]:
        """Requests that it may have though their clients left: now, or when it failed to answer."""
        at = min(time.monotonic(), self.failed_at)
        return [one for one in self.left if at - one.left_at < LEFT_SECONDS]

    def abort_all(self, *, died: bool = True) -> None:
        """End every request that waits for this engine."""
        for request in tuple(self.in_flight):
            request.abort(died=died)


def least_busy(engines: Iterable[RoutedEngine]) -> RoutedEngine | None:
    """The one that one more request fills least, see `RoutedEngine.rank`; None of none."""
    return min(engines, key=lambda one: one.rank, default=None)


class Outage:
    """No engine will be up for a while, as its supervisor knows.

    Args:
        reason: one clause for people.
        until: when the first engine is started again, by the clock.
        clock: seconds that only grow.
    """

    def __init__(self, reason: str, until: float, clock: Callable[[], float]) -> None:
        self.reason, self.until, self._clock = reason, until, clock

    @property
    def seconds_left(self) -> int:
        """Whole seconds until the next start, at least 1."""
        return max(1, ceil(self.until - self._clock()))

    @property
    def message(self) -> str:
        """Why, and until when."""
        return f"{self.reason}; the next start is in {self.seconds_left} s"


class Fleet:
    """All engines of a gateway, dead ones too; iterate over it for them."""

    def __init__(self, engines: Sequence[RoutedEngine]) -> None:
        self.engines = tuple(engines)
        #: What they hold at most, each size once.
        self.sizes = frozenset(one.capacity for one in engines)
        #: Whether any has a gate: texts hold something there too.
        self.gated = any(one.gate.units is not None for one in engines)
        #: Why none will be up for a while, where that is known.
        self.outage: Outage | None = None

    def __iter__(self) -> Iterator[RoutedEngine]:
        return iter(self.engines)

    def __len__(self) -> int:
        return len(self.engines)

    @property
    def open(self) -> int:
        """How many take requests."""
        return sum(engine.up for engine in self.engines)

    @property
    def retry_seconds(self) -> int:
        """Seconds after which to ask again where none serves: the first engine's next start.

        Under: a start that takes longer than the engine's last one, or than a minute.
        """
        if self.outage is not None:
            return self.outage.seconds_left
        now = time.monotonic()
        starts = [
            one.died_at + one.start_seconds + _UNSEEN_PAUSE - now
            for one in self.engines
            if one.start_seconds and one.death is not None and not one.answered
        ]
        left = [ceil(seconds) for seconds in starts if seconds > 0]
        return min(*left, _LONGEST_RETRY) if left else _RETRY

    def best(self, cost: Cost, turn: Turn | None = None) -> RoutedEngine | None:
        """The least busy engine that has room for so much, and for a turn; None where none has."""
        return least_busy(one for one in self.engines if one.fits(cost, turn))

    def dead(self) -> Refusal:
        """What clients are told while no engine is up."""
        if self.outage is None:
            return Refusal("engine_unavailable", retry_after=self.retry_seconds)
        return Refusal("engine_resting", why=self.outage.message, retry_after=self.retry_seconds)


class Affinity:
    """Keeps requests that share a long beginning on one engine, whose cache then holds it.

    Beginnings are known by hashes of whole messages; the last few thousand are remembered.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, RoutedEngine] = OrderedDict()

    def chooser(self, body: JsonObject) -> Chooser:
        """How to choose an engine for a request with this body."""
        prefixes = _prefixes(body)

        def choose(best: RoutedEngine, fits: Callable[[RoutedEngine], bool]) -> RoutedEngine:
            for prefix in reversed(prefixes):
                home = self._known.get(prefix)
                if (
                    home is not None
                    and home.outstanding <= best.outstanding + _DETOUR
                    and fits(home)
                ):
                    best = home
                    break
            for prefix in prefixes:
                self._known[prefix] = best
                self._known.move_to_end(prefix)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            return best

        return choose


def _prefixes(body: dict[str, Any]) -> list[bytes]:
    """Hashes of the request up to each message, the short ones left out."""
    state = blake2b(digest_size=16)
    found, length = [], 0
    messages = body.get("messages")
    parts = messages if isinstance(messages, list) else [body.get("prompt")]
    for part in (body.get("system"), body.get("tools"), *parts):
        data = msgspec.json.encode(part)
        state.update(data)
        length += len(data)
        if length >= _SHORTEST_PREFIX:
            found.append(state.copy().digest())
    return found
