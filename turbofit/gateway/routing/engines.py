"""The engines behind the gateway: their requests, their deaths, and the choice of an engine."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Final, NamedTuple

from turbofit.gateway.grammar_trials import Grammar
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import STEP_SECONDS, Cost, Gate
from turbofit.gateway.routing.conversations import Conversation

#: Seconds for which an engine is assumed to have a request whose client left. For an answer in one
#: piece, LMDeploy notices only at the next token that the client has left. A stream that has begun
#: ends at once. lmdeploy core/chat_runner.py::ChatRunner.collect #ea0f84
LEFT_SECONDS: Final = 10.0

#: Seconds after the death of a process in which its next process takes no requests yet.
_PAUSE: Final = 1.0
#: The most requests of an engine that are remembered after their clients have left.
_LEFT: Final = 64
#: Seconds of `Retry-After` if it is unknown when an engine starts.
_RETRY: Final = 5
#: The most seconds of `Retry-After`; older SDKs ignore a longer time.
_LONGEST_RETRY: Final = 60
_NEVER: Final = float("inf")
#: An engine is much busier than the others if it has so many times the mean of their requests, and
#: more than two requests beyond: with few requests, two at one engine are not many.
_MUCH_BUSIER: Final = 1.25
#: The most conversations whose engines are remembered.
_MOST_KEPT: Final = 4096
#: Seconds that are assumed between the end of an engine and its next start.
_UNSEEN_PAUSE: Final = 2.0


@dataclass
class Turn:
    """A suspect's turn at an engine.

    ``together``: the most suspects that the engine may have at once. ``alone``: the engine gets no
    new request before the suspect's answer begins.
    """

    fingerprint: str
    together: int
    alone: bool


@dataclass(eq=False)
class Present:
    """A request at an engine, with the facts that matter if the engine dies.

    ``fingerprint``: see `deny_list`; None for a request without a body, which cannot end an engine.
    ``begun``: a byte of its answer has come. ``left_at``: the time at which its client left. All
    times are by `time.monotonic`. ``grammar``: the grammar of its answer, ``said`` what of the
    answer has come (see `dear_steps`).
    """

    fingerprint: str | None = None
    begun: bool = False
    sent_at: float = float("-inf")
    left_at: float = float("inf")
    grammar: Grammar | None = None
    said: bytearray = field(default_factory=bytearray)


@dataclass(eq=False)
class EngineDeath:
    """The death of an engine: its process ended, or the engine was given up.

    ``at`` is its time by `time.monotonic`. ``accused``: fingerprints of the requests that may be
    the cause; ``together``: the most accused requests at an engine at once. ``in_turn``:
    fingerprints of the suspects that had their turn. ``noted``: the three fields
    before are filled in.
    ``ended``: a supervisor has seen the end of the process.
    """

    at: float
    accused: set[str] = field(default_factory=set)
    together: int = 1
    in_turn: frozenset[str] = frozenset()
    noted: bool = False
    ended: bool = False


class RoutedEngine:
    """One engine, or a node of a cluster; ``index`` is its unique number or the node's name.

    An engine with twice the ``share`` gets twice the requests. ``host_limit`` is the most bytes of
    host memory for the images of its requests; None means no limit. Times are by `time.monotonic`.
    """

    def __init__(
        self,
        index: int | str,
        url: str,
        share: float = 1.0,
        *,
        key: str | None = None,
        gate: Gate | None = None,
        host_limit: int | None = None,
    ) -> None:
        self.index, self.url, self.key, self.share = index, url.rstrip("/"), key, share
        self.gate, self.host_limit = gate or Gate(), host_limit
        #: The number of the engine's requests, and the host memory of their images in bytes.
        self.outstanding = self.host_bytes = 0
        #: Of each request, the processor time of its grammar at its dearest token.
        self.token_seconds: list[float] = []
        #: Whether the engine keeps what it has read, for the next turn of a conversation.
        self.prefix_caching = False
        #: The number of conversations whose last turn went to the engine.
        self.conversations = 0
        #: Whether the engine gets requests, since it answers or was not probed yet.
        self.up = True
        #: The number of failed probes in a row, and when the first failed.
        self.failures, self.failed_at = 0, float("inf")
        self.model: str | None = None
        #: Three times: when the last byte of a completion came, when the last byte of any answer
        #: came, and when the engine, which owed no answer before, got a request or a probe.
        self.last_success, self.last_byte_at, self.asked_at = float("-inf"), time.monotonic(), 0.0
        #: When the monitor last probed the engine.
        self.last_check = float("-inf")
        #: Whether a request failed; then the monitor probes the engine soon.
        self.suspect = True
        #: Whether the monitor waits for the answer to a probe.
        self.check_open = False
        #: When the supervisor will end the engine, which seems to hang; `_NEVER` for an engine that
        #: shows signs of life.
        self.ends_at = _NEVER
        #: The engine's requests in their order, each with the function that ends the request: with
        #: a refusal, or None since the engine was given up.
        self.in_flight: dict[Present, Callable[[Refusal | None], None]] = {}
        #: Set when a request with a grammar comes (see `dear_steps`).
        self.got_grammar = asyncio.Event()
        #: The tokens that the engine had counted when a probe last failed; 0 if unknown.
        self.tokens = 0.0
        #: The turns of the suspects at the engine, by their places (see `deny_list`).
        self.turns: dict[object, Turn] = {}
        #: The last death, and its time. For `answered` only later answers count.
        self.death: EngineDeath | None = None
        self.died_at = float("-inf")
        #: The seconds of the last start, from a death to the next answer; 0 if unknown.
        self.start_seconds = 0.0
        #: Whether the supervisor let the engine rest since its death; then the start is not timed.
        self.rested = False
        #: Whether the engine tells the first tokens of answers in one piece, too (`first_tokens`).
        self.tells_first_tokens = False
        #: Requests whose clients have left.
        self.left: deque[Present] = deque(maxlen=_LEFT)

    @property
    def in_turn(self) -> frozenset[str]:
        """The fingerprints of the suspects that have their turns at this engine."""
        return frozenset(turn.fingerprint for turn in self.turns.values())

    @property
    def turn_left(self) -> bool:
        """Whether the suspects at this engine let another suspect come."""
        return not self.turns or len(self.turns) < min(
            turn.together for turn in self.turns.values()
        )

    @property
    def owes(self) -> bool:
        """Whether clients or the monitor wait for an answer of the engine."""
        return self.outstanding > 0 or self.check_open

    @property
    def back_at(self) -> float:
        """The time, by `time.monotonic`, when the engine will answer again; infinity if unknown.

        The time is estimated from the seconds of the last start.
        """
        if not self.start_seconds:
            return _NEVER
        ends_at = self.died_at if self.dead_since(self.died_at) else self.ends_at
        return ends_at + self.start_seconds + _UNSEEN_PAUSE

    @property
    def serves(self) -> bool:
        """Whether the engine takes requests, and has answered a request since it last died."""
        return self.up and self.answered

    @property
    def answered(self) -> bool:
        """Whether the engine has answered a request since it last died."""
        return self.last_success > self.died_at

    def dead_since(self, moment: float) -> bool:
        """Return whether the engine died after ``moment``, and has not answered since its death."""
        return self.death is not None and self.died_at >= moment and not self.answered

    @property
    def rank(self) -> tuple[float, float, float, int | str]:
        """A sort key for the choice of an engine; the engine with the least key is chosen.

        The key is the number of requests, with one more, divided by the share. Engines with equal
        numbers are compared by their vision units, then by the conversations that they keep, both
        divided by the share.
        """
        by_share = (self.outstanding + 1, self.gate.counted, self.conversations)
        requests, units, conversations = (number / self.share for number in by_share)
        return requests, units, conversations, self.index

    def fits(self, cost: Cost, turn: Turn | None = None) -> bool:
        """Return whether the engine takes requests, and has room for another request of this cost.

        ``turn`` is the turn that the request must take if it is a suspect.
        """
        if not self.takes(cost) or not self.gate.fits(cost):
            return False
        if turn is not None and not (self.turn_left and len(self.turns) < turn.together):
            return False
        most = self.host_limit
        return not cost.host_bytes or most is None or self.host_bytes + cost.host_bytes <= most

    def takes(self, cost: Cost) -> bool:
        """Return whether the engine takes a request as soon as there is room for its images."""
        alone = any(each.alone for each in self.turns.values())
        return self.up and not alone and self.fits_grammar(cost)

    def fits_grammar(self, cost: Cost) -> bool:
        """Return whether the grammars at the engine leave time for one more at a token.

        TurboMind computes the masks of all its requests one after another, before each token of
        the batch. The sum is more than most steps take, since the dearest tokens of all grammars
        seldom meet.
        """
        if not cost.token_seconds or not self.token_seconds:
            return True
        return sum(self.token_seconds) + cost.token_seconds <= STEP_SECONDS

    def succeeded(self) -> None:
        """Note that the engine works, since a byte of a completion came."""
        now = time.monotonic()
        if self.dead_since(self.died_at) and not self.rested:
            self.start_seconds = now - self.died_at
        self.rested = False
        self.last_success = self.last_byte_at = now
        self.failures, self.failed_at = 0, float("inf")
        self.suspect = self.check_open = False
        self.ends_at = _NEVER

    def note_byte(self) -> None:
        self.last_byte_at = time.monotonic()

    @property
    def silent_since(self) -> float:
        """The time, by `time.monotonic`, since which the engine is silent.

        This is the time of the last byte or the time when the engine began to owe answers,
        whichever is later.
        """
        return max(self.last_byte_at, self.asked_at)

    def note_death(self, sent_at: float = float("-inf")) -> EngineDeath:
        """Note that the engine died or was given up; return the death.

        Requests that break off together get the same death. ``sent_at`` is the time when the
        request that broke off was sent. The death is new if the engine answered after its last
        death, or if that request was sent clearly after the last death.
        """
        if self.death is None or max(self.last_success, sent_at - _PAUSE) > self.died_at:
            self.death = EngineDeath(time.monotonic())
            self.died_at = self.death.at
        return self.death

    def note_end(self) -> EngineDeath:
        """Note that a supervisor saw the process end; return the death.

        This death may have been noted before, when a request broke off.
        """
        if self.death is not None and self.death.ended:
            self.death = None  # the death of the previous process
        death = self.note_death()
        death.ended = True
        return death

    def left_lately(self) -> list[Present]:
        """Return requests whose clients left lately, and which may still be at the engine."""
        at = min(time.monotonic(), self.failed_at)
        return [present for present in self.left if at - present.left_at < LEFT_SECONDS]

    def abort_all(self) -> None:
        """End all requests at the engine, since the engine was given up."""
        for stop in tuple(self.in_flight.values()):
            stop(None)


class Outage(NamedTuple):
    """A time in which no engine is up, as the engines' supervisor reports it.

    ``reason`` is one clause for people. ``until`` is the time, by ``clock``, when the first engine
    starts again.
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
    """All engines of a gateway, including dead ones."""

    def __init__(self, engines: Sequence[RoutedEngine]) -> None:
        self.engines = tuple(engines)
        #: Whether any engine limits units; then requests without images also reserve tokens.
        self.gated = any(engine.gate.units is not None for engine in engines)
        #: Why no engine will be up for a while, if that is known.
        self.outage: Outage | None = None
        #: The engine of each conversation's last turn, by its beginning; the oldest is first.
        self._kept: OrderedDict[bytes, RoutedEngine] = OrderedDict()
        #: How many requests with a beginning are at engines.
        self.running: Counter[bytes] = Counter()

    @property
    def open(self) -> int:
        """The number of engines that take requests."""
        return sum(engine.up for engine in self.engines)

    @property
    def keeps_conversations(self) -> bool:
        """Whether it matters which engine gets the next turn of a conversation."""
        return len(self.engines) > 1 and any(engine.prefix_caching for engine in self.engines)

    @property
    def retry_seconds(self) -> int:
        """Seconds until an engine is expected to serve, after which a client should try again."""
        if self.outage is not None:
            return self.outage.seconds_left
        now = time.monotonic()
        left = [engine.back_at - now for engine in self.engines if now < engine.back_at < _NEVER]
        return min(*map(ceil, left), _LONGEST_RETRY) if left else _RETRY

    def best(
        self,
        cost: Cost,
        turn: Turn | None = None,
        conversation: Conversation | None = None,
        awaited: Collection[RoutedEngine] = (),
    ) -> RoutedEngine | None:
        """Return the best engine with room for a request; None if the request waits.

        This is the request's `keeper`, for which it waits; else the least busy engine with room.
        ``turn`` is the turn that the request must take if it is a suspect: it waits for no keeper.
        Requests before this one wait for the ``awaited`` engines.
        """
        fitting = [each for each in self.engines if each not in awaited and each.fits(cost, turn)]
        keeper = self.keeper(cost, conversation)
        if keeper in fitting:
            return keeper
        if keeper is not None and turn is None:
            return None
        return min(fitting, key=lambda engine: engine.rank, default=None)

    def keeper(self, cost: Cost, conversation: Conversation | None) -> RoutedEngine | None:
        """Return the engine that keeps a conversation, if a request may go or wait there.

        None if the engine is much busier than the others, or lacks more than first tokens. A
        conversation has one turn at a time: no request waits that begins like one under way, so
        that many equal beginnings use all engines.
        """
        if conversation is None or not conversation.goes_on:
            return None
        keeper = self._kept.get(conversation.beginning)
        if keeper is None or not keeper.up or self._much_busier(keeper):
            return None
        if keeper.fits(cost):
            return keeper
        # An engine that misses a look may hang.
        works = keeper.takes(cost) and not keeper.failures
        alone = conversation.beginning not in self.running
        return keeper if works and alone and keeper.gate.fits_soon(cost) else None

    def note(self, conversation: Conversation, engine: RoutedEngine) -> bool:
        """Note that a turn goes to an engine; return whether the turn before went there, too."""
        self.running[conversation.beginning] += 1
        before = self._kept.pop(conversation.beginning, None)
        kept = conversation.goes_on and before is engine
        if before is None and len(self._kept) == _MOST_KEPT:
            _, before = self._kept.popitem(last=False)
        if before is not None:
            before.conversations -= 1
        self._kept[conversation.beginning] = engine
        engine.conversations += 1
        return kept

    def ended(self, conversation: Conversation) -> None:
        """Note that a turn, which `note` noted, is no longer at its engine."""
        self.running[conversation.beginning] -= 1
        if not self.running[conversation.beginning]:
            del self.running[conversation.beginning]

    @property
    def moved_at(self) -> float:
        """The time when an engine that takes requests last sent a byte, or was seen to work on."""
        return max((engine.last_byte_at for engine in self.engines if engine.up), default=-_NEVER)

    def lacks(self, cost: Cost, conversation: Conversation | None = None) -> str:
        """Return what a request that no engine takes waits for, as words for people."""
        keeper = self.keeper(cost, conversation)
        up = [engine for engine in self.engines if engine.up and keeper in (None, engine)]
        if not up:
            return "an engine"
        if not any(engine.fits_grammar(cost) for engine in up):
            return "the ends of answers with other dear grammars"
        lacks = [engine.gate.lacks(cost) for engine in up]
        return lacks[0] if all(lacks) else "host memory for its images"

    def _much_busier(self, engine: RoutedEngine) -> bool:
        """Return whether an engine has many more requests, for its share, than all engines."""
        up = [each for each in self.engines if each.up]
        mean = sum(each.outstanding for each in up) / sum(each.share for each in up)
        return engine.outstanding > _MUCH_BUSIER * mean * engine.share + 2

    def dead(self) -> Refusal:
        """Return the refusal that clients get while no engine is up."""
        if self.outage is None:
            return Refusal("engine_unavailable", retry_after=self.retry_seconds)
        return Refusal("engine_resting", why=self.outage.message, retry_after=self.retry_seconds)
