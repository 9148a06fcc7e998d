"""Lets suspects run again: alone on an engine, the least suspected first, and never at everybody's.

A suspect waits in a line of its own. An engine is reserved for the line: it gets nothing new, and
once it is empty the first of the line has it for itself, until its answer begins (until its end,
where an engine died of it or beside it after its answer had begun, or its client had left). Where
another is empty first, that one is reserved instead: an engine may be stuck in what it has. One
engine is reserved at a time, one in four of a large fleet, and none while fewer than two serve. Of
equal suspects one runs at a time. Where the line is full, the newest suspect of the client that has
most of it makes room for a client that has fewer.

An engine that has answered nobody since its process ended may die of itself, and convict a request
that is innocent of it. It is asked for a token first, by the monitor; only engines that have
answered are reserved.

An engine may yet die of a request whose client went away. No suspect gets that engine before the
time is over in which it may still have the request. Where that was a suspect, the engine is asked
for a token, and nobody at all gets it before it answers.

A suspect that has run alone for half a minute has the engine no longer for itself (under: what
kills later than that meets others). A server of one engine has no other choice than that one. There
the line gets the engine for ten seconds at most, the time in which it empties included; where
others wait, they have it as long afterwards. Where others have asked lately, they have it for the
first ten seconds after its start, too, since a suspect may end it at once. An empty engine that
must first outlive requests whose clients left is kept until one suspect has had it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.quarantine.identity import LEFT_SECONDS
from turbofit.gateway.routing.admission import dead
from turbofit.gateway.routing.engines import least_busy
from turbofit.gateway.routing.retry import withheld

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from turbofit.gateway.limits.cost import Cost
    from turbofit.gateway.quarantine.suspects import Suspects
    from turbofit.gateway.routing.admission import Admission
    from turbofit.gateway.routing.engines import RoutedEngine
    from turbofit.gateway.routing.fleet import Fleet

__all__ = ["Trials"]

#: Engines of which one may be put at risk.
_FLEET_OF_ONE_TRIAL: Final = 4
#: Seconds in which all who were at a death have come to the line.
_GATHER: Final = 0.2
#: Seconds by which a timer of the fastest loop, which counts milliseconds, is surely not early.
_EARLY: Final = 0.02
#: Seconds that suspects may keep the only engine from others.
_SESSION: Final = 10.0
#: Seconds for which a client that asked is expected again; the last clients are remembered.
_LATELY: Final = 120.0
_REMEMBERED: Final = 64
#: Seconds that one suspect may have an engine for itself.
_LONGEST_ALONE: Final = 30.0
_RETRY: Final = 10


class _Waiter:
    """A suspect in line.

    Args:
        client: whose it is.
        fingerprint: what it is known by.
        cost: what it will hold.
        avoid: engines that had it already; with any, it is sent again by this gateway.
        since: when it came, and ``ready``: when it may run.
    """

    __slots__ = ("avoid", "client", "cost", "fingerprint", "future", "ready", "since")

    def __init__(
        self,
        client: str,
        fingerprint: str,
        cost: Cost,
        avoid: Collection[RoutedEngine],
        since: float,
        ready: float,
    ) -> None:
        self.client, self.fingerprint, self.cost, self.avoid = client, fingerprint, cost, avoid
        self.since, self.ready = since, ready
        self.future: asyncio.Future[RoutedEngine | None]
        self.future = asyncio.get_running_loop().create_future()

    def may_have(self, engine: RoutedEngine) -> bool:
        """Whether an engine that is empty has room for it, and it was not there before."""
        return engine not in self.avoid and engine.capacity.holds(self.cost)


class Trials:
    """The line of suspects.

    Args:
        fleet: the engines.
        admission: whose places a suspect takes, and which lets others in again afterwards.
        suspects: says who still is one, and how much.
        clock: seconds that only grow.
        ask: asks an engine for a token, and has `pump` called once it answers.
        longest: how many may wait.
        seconds: how long one may wait.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        fleet: Fleet,
        admission: Admission,
        suspects: Suspects,
        clock: Callable[[], float],
        ask: Callable[[RoutedEngine], None],
        *,
        longest: int = 256,
        seconds: float = 30.0,
    ) -> None:
        self._fleet, self._admission, self._suspects = fleet, admission, suspects
        self._clock, self._longest, self._seconds = clock, longest, seconds
        self._ask = ask
        self._line: list[_Waiter] = []
        #: Engines that are reserved, and since when; those of them that have a suspect, and which.
        self._reserved: dict[RoutedEngine, float] = {}
        self._running: dict[RoutedEngine, tuple[float, str]] = {}
        #: Reserved engines that a suspect has had since.
        self._used: set[RoutedEngine] = set()
        #: Those whose suspect left without an answer: when, and until when they may have it.
        self._left: dict[RoutedEngine, tuple[float, float]] = {}
        #: Those of which it is looked later whether they are empty.
        self._outlived: set[RoutedEngine] = set()
        self._pause_until = float("-inf")
        #: When each of the last clients sent a request, the newest last.
        self._clients: OrderedDict[str, float] = OrderedDict()

    @property
    def waiting(self) -> int:
        """How many are in line."""
        return len(self._line)

    def note_client(self, client: str) -> None:
        """A client sends a request, a suspect's or not."""
        self._clients[client] = self._clock()
        self._clients.move_to_end(client)
        if len(self._clients) > _REMEMBERED:
            self._clients.popitem(last=False)

    async def admit(
        self,
        client: str,
        fingerprint: str,
        cost: Cost,
        avoid: Collection[RoutedEngine] = (),
        since: float = 0.0,
    ) -> RoutedEngine | None:
        """Wait for an engine of its own, and take it.

        Args:
            client: whose it is.
            fingerprint: whose suspicion it is.
            cost: what it will hold; give it back with `release`.
            avoid: engines that had this request already. It was sent again by this gateway: it
                runs alone even where somebody else is convicted meanwhile.
            since: when it came; of two that are suspected alike the newer one waits.

        Returns:
            The engine, or None where it is no suspect any more, or convicted.

        Raises:
            Refusal: 503 where the line is too long, or the wait was, or no engine may be put at
                risk for it.
        """
        if len(self._line) >= self._longest and not self._makes_room(client):
            raise _late(f"{len(self._line)} such requests wait already")
        waiter = _Waiter(client, fingerprint, cost, avoid, since, self._clock() + _GATHER)
        self._line.append(waiter)
        self._pump_in(_GATHER)
        self.pump()
        try:
            done, _ = await asyncio.wait((waiter.future,), timeout=self._seconds)
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        if not done:
            self._leave(waiter)
            raise _late(f"no engine was free for it within {self._seconds:.0f} s")
        return waiter.future.result()

    def begin(self, engine: RoutedEngine, cost: Cost) -> bool:
        """Its answer has begun: others may come to this engine; whether it holds nothing more."""
        self._running.pop(engine, None)
        ended = self._admission.begin(engine, cost)
        self.pump()
        return ended

    def release(self, engine: RoutedEngine, cost: Cost, after: float = 0.0) -> None:
        """Its answer has ended, or it will have none: others may come to this engine.

        Args:
            engine: where it was.
            cost: what it held.
            after: seconds in which the engine may still have it; see `Admission.release`.
        """
        if after and engine in self._running:
            self._left[engine] = self._clock(), self._clock() + after
            self._ask(engine)
            self._pump_in(after)
        else:
            self._running.pop(engine, None)
        self._admission.release(engine, cost, after)
        self.pump()

    def pump(self) -> None:
        """Look who may run now; call it too when a request ended, or an engine came or went."""
        self._clear_left()
        if not self._line and not self._reserved:
            return
        for waiter in tuple(self._line):
            self._look(waiter)
        self._line.sort(key=lambda one: (self._suspects.weight(one.fingerprint), one.since))
        self._give_back()
        for engine in self._fleet if self._line else ():
            if engine.takes and not engine.serves:
                self._ask(engine)
        while self._reserve():
            pass
        for engine in tuple(self._reserved):
            if engine not in self._running and engine.idle:
                self._begin(engine) if _empty(engine) else self._outlive(engine)

    def _makes_room(self, client: str) -> bool:
        """Send the newest suspect of whoever has most of the line away, if a client has fewer."""
        of = Counter(one.client for one in self._line)
        who, most = of.most_common(1)[0]
        if most <= of[client] + 1:
            return False
        newest = max((one for one in self._line if one.client == who), key=lambda one: one.since)
        self._line.remove(newest)
        why = f"{len(self._line) + 1} such requests wait already, most of them this client's"
        newest.future.set_exception(_late(why))
        return True

    def _pump_in(self, seconds: float) -> None:
        """Look again when so much time has passed by the clock: a loop's timer may be early."""
        asyncio.get_running_loop().call_later(seconds + _EARLY, self.pump)

    def _look(self, waiter: _Waiter) -> None:
        """Let a waiter go that need not wait any longer."""
        name, again = waiter.fingerprint, bool(waiter.avoid)
        if not self._fleet.open:
            waiter.future.set_exception(dead(self._fleet))
        elif again and not self._fleet.spare:
            waiter.future.set_exception(withheld("last_engine"))
        elif self._suspects.conviction(name) is not None or (
            not again and self._suspects.suspicion(name) is None
        ):
            waiter.future.set_result(None)
        if waiter.future.done():
            self._line.remove(waiter)

    def _begin(self, engine: RoutedEngine) -> None:
        """Give an empty engine to the first who may have it."""
        able = [one for one in self._next if one.may_have(engine)]
        waiter = next((one for one in able if one.ready <= self._clock()), None)
        if waiter is None:
            if not able:
                self._open(engine)
            return
        self._line.remove(waiter)
        self._used.add(engine)
        self._running[engine] = self._clock(), waiter.fingerprint
        self._pump_in(_LONGEST_ALONE)
        waiter.future.set_result(self._admission.take(engine, waiter.cost))

    def _outlive(self, engine: RoutedEngine) -> None:
        """Look again when an engine that gets nothing new has surely nothing any more."""

        def look() -> None:
            self._outlived.discard(engine)
            self.pump()

        if engine not in self._outlived:
            self._outlived.add(engine)
            asyncio.get_running_loop().call_later(LEFT_SECONDS + _EARLY, look)

    def _give_back(self) -> None:
        """End the reservations that nobody needs, or that have lasted too long."""
        now = self._clock()
        for engine, since in tuple(self._reserved.items()):
            if engine.fleet is not self._fleet or not engine.serves:
                self._open(engine)
            elif engine in self._running:
                if now - self._running[engine][0] >= _LONGEST_ALONE:
                    self._open(engine)
            elif self._in_vain(engine):
                self._open(engine)
            elif self._session_over(engine, now - since):
                self._pause_until = now + (now - since)
                self._pump_in(now - since)
                self._open(engine)

    def _in_vain(self, engine: RoutedEngine) -> bool:
        """Whether nobody may have a reserved engine, or could have another at once."""
        if not any(one.may_have(engine) for one in self._next):
            return True
        return not _empty(engine) and any(map(_empty, self._able(besides=engine)))

    def _clear_left(self) -> None:
        """Release engines that have answered since their suspect left, died, or had the time to."""
        now = self._clock()
        for engine, (since, until) in tuple(self._left.items()):
            if engine.last_success > since or now >= until or not engine.serves:
                del self._left[engine]
                self._running.pop(engine, None)

    def _open(self, engine: RoutedEngine) -> None:
        """Others may come to an engine again."""
        del self._reserved[engine]
        self._used.discard(engine)
        engine.reserved = False
        self._fleet.version += 1
        self._admission.pump()

    def _session_over(self, engine: RoutedEngine, seconds: float) -> bool:
        """Whether the only engine was kept for so long that it is the others' turn.

        Those who wait for it, or still have it. Not before a suspect has had it where only clients
        that left may have something there: that ends soon.
        """
        if not self._alone or seconds < _SESSION or (engine.idle and engine not in self._used):
            return False
        return self._admission.waiting > 0 or not engine.idle

    def _reserve(self) -> bool:
        """Reserve one more engine, where one may be put at risk; whether it was."""
        serving = [engine for engine in self._fleet if engine.serves]
        room = max(1, len(serving) // _FLEET_OF_ONE_TRIAL) - len(self._reserved)
        if self._alone and serving:
            self._put_others_first(serving[0])
        if room <= 0 or self._clock() < self._pause_until:
            return False
        if not self._alone and len(serving) < 2:
            return False
        found = self._able()
        if not found:
            return False
        engine = least_busy([one for one in found if _empty(one)] or found)
        engine.reserved = True
        self._reserved[engine] = self._clock()
        if self._alone:
            self._pump_in(_SESSION)
        return True

    def _put_others_first(self, engine: RoutedEngine) -> None:
        """After the only engine's start it is the others' turn: suspects may end it at once.

        Where no other client has asked lately, nobody waits.
        """
        now, until = self._clock(), engine.back_at + _SESSION
        if until <= max(now, self._pause_until):
            return
        suspects = {one.client for one in self._line}
        lately = (client for client, at in self._clients.items() if at > now - _LATELY)
        if any(client not in suspects for client in lately):
            self._pause_until = until
            self._pump_in(until - now)

    @property
    def _next(self) -> list[_Waiter]:
        """The first of the line of each fingerprint, but for those of which one runs."""
        seen = {fingerprint for _, fingerprint in self._running.values()}
        first = []
        for waiter in self._line:
            if waiter.fingerprint not in seen:
                seen.add(waiter.fingerprint)
                first.append(waiter)
        return first

    def _able(self, besides: RoutedEngine | None = None) -> list[RoutedEngine]:
        """Engines that could be reserved for the line; ``besides``: as if that one were not."""
        able = [one.may_have for one in self._unserved(besides)]
        # One that has run alone for long goes on, and may keep its engine for minutes yet.
        free = [
            one for one in self._fleet
            if one.serves and not one.reserved and one not in self._running
        ]  # fmt: skip
        return [one for one in free if any(may(one) for may in able)]

    def _unserved(self, besides: RoutedEngine | None) -> list[_Waiter]:
        """Who may run next, beyond the ones for whom another engine is kept already."""
        free = [one for one in self._reserved if one not in self._running and one is not besides]
        unserved = []
        for waiter in self._next:
            engine = next(filter(waiter.may_have, free), None)
            if engine is None:
                unserved.append(waiter)
            else:
                free.remove(engine)
        return unserved

    @property
    def _alone(self) -> bool:
        return len(self._fleet) == 1

    def _leave(self, waiter: _Waiter) -> None:
        """Stop waiting; an engine that was just given goes back."""
        if waiter in self._line:
            self._line.remove(waiter)
        given = waiter.future.done() and waiter.future.exception() is None
        engine = waiter.future.result() if given else None
        if engine is not None:
            self.release(engine, waiter.cost)
        else:
            waiter.future.cancel()
            self.pump()


def _empty(engine: RoutedEngine) -> bool:
    """Whether it has no request, nor may have one whose client left."""
    return engine.idle and not engine.may_have_another()


def _late(why: str) -> Refusal:
    return Refusal(
        503,
        "suspect_waits",
        "the inference engine ended while it had this request, which runs again only alone on an "
        f"engine: {why}",
        retry_after=_RETRY,
    )
