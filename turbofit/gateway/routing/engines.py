"""The engines behind the gateway: what each is doing, and which one is next."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from turbofit.gateway.limits.gate import EngineCapacity
from turbofit.gateway.routing.suspects import LEFT_SECONDS, EngineDeath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from turbofit.core.json_types import JsonObject
    from turbofit.gateway.limits.cost import Cost
    from turbofit.gateway.limits.gate import Gate
    from turbofit.gateway.routing.stuck import InFlight
    from turbofit.gateway.routing.suspects import Present, Turn

    #: Rank, a number of its own, engine.
    Entry = tuple[tuple[float, float, float], int, "RoutedEngine"]

    #: From the least busy engine that has room, and whether another one has it too.
    Chooser = Callable[["RoutedEngine", Callable[["RoutedEngine"], bool]], "RoutedEngine"]

    class RankListener(Protocol):
        """Hears when an engine has a better rank, and when it takes requests or none any more."""

        def risen(self, engine: RoutedEngine) -> None: ...
        def turned(self, engine: RoutedEngine) -> None: ...


__all__ = ["Affinity", "RoutedEngine", "least_busy"]

#: Prefixes shorter than this many bytes of JSON are not worth a detour.
_SHORTEST_PREFIX: Final = 2048
_REMEMBERED: Final = 8192
#: A prefix's own engine may have so many requests more than the least busy one.
_DETOUR: Final = 4
#: No process is started again, and takes a request, within so many seconds of its death.
_PAUSE: Final = 1.0
#: Requests whose clients left that an engine remembers.
_LEFT: Final = 64


class RoutedEngine:
    """One engine.

    Where it stands in the fleet's order follows from what is written here, at once.

    Args:
        index: its number, unlike that of any other.
        url: its address, without a final slash.
        share: how many requests it takes beside the others' shares.
        name: what metrics and logs call it, None for its number.
        key: its API key.
        gate: which requests may be there together, None for any.
        host_limit: bytes of host memory of images in flight to it, None for any number.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        index: int,
        url: str,
        share: float = 1.0,
        *,
        name: str | None = None,
        key: str | None = None,
        gate: Gate | None = None,
        host_limit: int | None = None,
    ) -> None:
        self.index, self.url, self.key = index, url.rstrip("/"), key
        #: Of engines that are as full as each other the one with the lowest is next.
        self.turn: float = index
        self.label: int | str = index if name is None else name
        self.gate, self.host_limit = gate, host_limit
        self.fleet: RankListener | None = None
        #: The fleet's newest note of where it stands.
        self.entry: Entry | None = None
        self.host_bytes = 0
        self._share, self._outstanding, self._units = share, 0, 0
        self._up = True
        #: Whether it gets requests.
        self.takes = True
        #: Failed probes in a row, and when the engine first failed to answer one.
        self.failures, self.failed_at = 0, float("inf")
        self.model: str | None = None
        now = time.monotonic()
        #: When a completion last brought a byte, and when anything last did.
        self.last_success = float("-inf")
        self.last_byte = now
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
    def name(self) -> str:
        """Its label as text."""
        return str(self.label)

    @property
    def up(self) -> bool:
        """Whether it answers; an engine that was never asked is taken to answer."""
        return self._up

    @up.setter
    def up(self, up: bool) -> None:
        self._up = up
        self._turn()

    @property
    def serves(self) -> bool:
        """Whether it takes requests, and has answered one since it died."""
        return self.takes and self.answered

    @property
    def answered(self) -> bool:
        """Whether it has answered a request since it last died."""
        return self.last_success > self.died_at

    def dead_since(self, moment: float) -> bool:
        """Whether it has died since a moment, and has not answered again."""
        return self.death is not None and self.died_at >= moment and not self.answered

    @property
    def share(self) -> float:
        """How many requests it takes beside the others' shares."""
        return self._share

    @share.setter
    def share(self, share: float) -> None:
        self._share = share
        self._rise()

    @property
    def outstanding(self) -> int:
        """Requests that it has."""
        return self._outstanding

    @outstanding.setter
    def outstanding(self, outstanding: int) -> None:
        fewer, self._outstanding = outstanding < self._outstanding, outstanding
        if fewer:
            self._rise()

    @property
    def units(self) -> int:
        """Vision units that it has."""
        return self._units

    @units.setter
    def units(self, units: int) -> None:
        fewer, self._units = units < self._units, units
        if fewer:
            self._rise()

    @property
    def rank(self) -> tuple[float, float, float]:
        """How full one more request would make it, the smaller the better.

        Full is relative to its share: an engine of twice the share gets twice the requests. Of
        equals the one with the fewest units is next.
        """
        share = self._share
        return ((self._outstanding + 1) / share, self._units / share, self.turn)

    def fits(self, cost: Cost, turn: Turn | None = None) -> bool:
        """Whether it takes requests, and has room for this one beside those it has."""
        return (
            self.takes
            and (self.turn_of is None or (turn is None and not self.turn_of.alone))
            and (self.gate is None or self.gate.fits(cost))
            and (
                not cost.host_bytes
                or self.host_limit is None
                or self.host_bytes + cost.host_bytes <= self.host_limit
            )
        )

    @property
    def capacity(self) -> EngineCapacity:
        """What it holds at most."""
        if self.gate is None:
            return EngineCapacity(host_bytes=self.host_limit)
        return EngineCapacity(units=self.gate.units, kv=self.gate.kv, host_bytes=self.host_limit)

    def _rise(self) -> None:
        if self.fleet is not None:
            self.fleet.risen(self)

    def _turn(self) -> None:
        before, self.takes = self.takes, self._up
        if self.fleet is not None and before is not self.takes:
            self.fleet.turned(self)

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
            self.death = EngineDeath(self.index)
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
        """End every request that waits for this engine.

        Args:
            died: whether it may have died of one of them.
        """
        for request in tuple(self.in_flight):
            request.abort(died=died)


def least_busy(engines: Iterable[RoutedEngine]) -> RoutedEngine:
    """The one that one more request fills least, see `RoutedEngine.rank`."""
    return min(engines, key=lambda one: one.rank)


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
                    and home.fleet is best.fleet
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
