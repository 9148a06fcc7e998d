"""Finds the bad request that ends engines among those that they had, and refuses it.

1. An engine ends, or answers nobody and is given up, and no other cause is known. All that it had
is *suspected*: each request by its fingerprint, and its client by name. A request whose client left
less than ten seconds before counts, too. All of them get 503 with ``Retry-After``.
2. A suspected request that comes again, and a new one of a suspected client, takes a *turn*: one at
a time on an engine, beside unsuspected requests, until its answer begins (ten seconds longer if a
death met an answer that had begun). `admission` has the queue. So the next death has one suspect. A
turn that ends well clears the request and its client, and so does an answer.
3. The engine dies in a request's turn. If every other request there had begun its answer, this one
is refused for a day. If not, the cause is still unknown: in its next turn it is *alone*, so the
engine gets no new request meanwhile, and if it dies then, this request is refused.
4. A client that is the only one at each of the last four deaths within an hour is refused for an
hour, if there are other clients: it sends a new variation each time.
5. A refusal explains the deaths at which the refused one was. Nobody else is suspected of them, and
they do not count towards the engine's rest.

A death with another cause (the process was killed, a card is lost, others took its memory) accuses
nobody: `DenyList.engine_ended` takes back what was concluded from it.

Copies that are sent at once may end one engine each before they are refused. A request that ends
engines later than ten seconds after its answer began has no turn then; its client is refused after
four deaths. If an engine dies by itself in a request's second turn, the request is refused wrongly.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from functools import reduce
from typing import TYPE_CHECKING, Final

from turbofit.core.process.log import LazyLogger
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.routing.deny_file import DAY_SECONDS
from turbofit.gateway.routing.engines import EngineDeath, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.gateway.routing.deny_file import Denied, DenyFile
    from turbofit.gateway.routing.engines import Present, RoutedEngine

_LOG: Final = LazyLogger(__name__)

#: Seconds that a suspicion lasts without a new request, and that a client is refused.
_HOUR: Final = 3600.0
#: Deaths after which a client is refused; fewer than the six that make a supervisor rest an engine.
CLIENT_DEATHS: Final = 4
#: Stands for no engine: an engine that is stuck in a single request has not ended.
_NO_ENGINE: Final = -1
_MOST_DEATHS: Final = 256
_MOST_CLIENTS: Final = 1024
#: Seconds until a write is tried again if the disk was full.
_AGAIN_SECONDS: Final = 15.0


class DenyList:
    """Suspected and refused requests and clients; it belongs to one event loop at a time."""

    def __init__(self, file: DenyFile) -> None:
        self.file = file
        #: The newest is last. A supervisor's thread reads it, so it is only replaced as a whole.
        self._deaths: tuple[EngineDeath, ...] = ()
        #: When each client last came, the newest last.
        self._clients: OrderedDict[str, float] = OrderedDict()
        self._keeping: asyncio.Task[None] | None = None
        #: Counts for the metrics page of the current gateway.
        self.count: Callable[..., None] = lambda *_: None

    # -- a request comes

    def check_client(self, client: str) -> None:
        """Refuse a client that was at too many deaths (429).

        Raises:
            Refusal: the client was at too many deaths, and its hour is not over.
        """
        self._clients[client] = time.monotonic()
        self._clients.move_to_end(client)
        if len(self._clients) > _MOST_CLIENTS:
            self._clients.popitem(last=False)
        denied = self.refused(client)
        if denied is not None:
            seconds = denied.seconds_left
            raise Refusal(
                "too_many_deaths", deaths=denied.deaths, seconds=seconds, retry_after=seconds
            )

    async def turn(self, request: Present) -> Turn | None:
        """The turn that a suspected request must take; None for others.

        Raises:
            Refusal: engines died of this request (422).
        """
        if request.fingerprint is None or (
            not self.file.denied and not any(death.accused for death in self._unexplained())
        ):
            return None
        name = await asyncio.shield(request.fingerprint)
        denied = self.refused(name)
        if denied is not None:
            last, until = _date(denied.since), _date(denied.until)
            raise Refusal("convicted", deaths=denied.deaths, last=last, until=until)
        return self._turn_of(name) or self._turn_of(request.client)

    def _turn_of(self, name: str) -> Turn | None:
        met, since = [], time.monotonic() - _HOUR
        for death in reversed(self._deaths):
            if name in death.accused and not death.explained:
                if death.at <= since:
                    break
                met.append(death.accused[name])
                since = death.at - _HOUR  # each death renews the hour
        if not met:
            return None
        return Turn(
            name,
            alone=any(accusation.in_turn for accusation in met[:-1]),
            longer=any(accusation.begun for accusation in met),
        )

    def refused(self, name: str) -> Denied | None:
        """The entry of a fingerprint or client if it is refused, else None."""
        if self.file.of(name) is not None:  # a person may have let it in meanwhile
            for pardoned in self.file.look_again():
                self._forget(pardoned)
        return self.file.of(name)

    def answered(self, request: Present) -> None:
        """Clear a suspect whose turn ended well, or a request that was answered to its end."""
        if self._deaths and request.fingerprint is not None and request.fingerprint.done():
            name = request.fingerprint.result()
            for death in self._deaths:
                death.suspects.pop(name, None)
                death.accused.pop(name, None)
                death.accused.pop(request.client, None)

    # -- an engine ends

    def engine_died(self, engine: RoutedEngine, sent_at: float = float("-inf")) -> EngineDeath:
        """Suspect all requests of an engine that broke off a request, or is given up."""
        death = engine.note_death(sent_at)
        if death.concluding is None and not death.explained:
            there = [request.present for request in engine.in_flight] + engine.left_lately()
            there = [present for present in there if present.fingerprint is not None]
            if there:
                engine.left.clear()
                self.count("engine_deaths_total", f"engine={engine.index}")
                turn = engine.turn_of
                mine = [present for present in there if turn is not None and present.turn is turn]
                self._note(death, there, mine[0] if mine else None)
        return death

    def nothing_listens(self, engine: RoutedEngine) -> EngineDeath | None:
        """Note that an engine's address is dead: a request that was left may have ended the engine.

        Returns None if no request was left lately. The requests that the engine still has notice
        the end themselves.
        """
        left = [present.sent_at for present in engine.left_lately()]
        return self.engine_died(engine, max(left)) if left else None

    def stuck(self, engine: RoutedEngine, request: Present) -> EngineDeath:
        """Note that an engine is stuck in one request, but serves others: it counts as a death."""
        death = EngineDeath(_NO_ENGINE, time.monotonic())
        if request.fingerprint is not None:
            in_turn = request.turn is not None and request.turn is engine.turn_of
            self._note(death, [request], request if in_turn else None)
        return death

    def engine_ended(self, engine: RoutedEngine, *, other_cause: bool) -> None:
        death = engine.note_end()
        if not other_cause:
            self.engine_died(engine)
            return
        # Requests whose clients left before this end are not accused of the next process's death.
        engine.left.clear()
        engine.failed_at = float("inf")
        death.explained = True
        if death.concluding is not None:
            death.concluding.add_done_callback(lambda _: self._take_back(death))

    def explained(self, engine: int, seconds: float) -> int:
        """The number of an engine's explained deaths within ``seconds``; any thread may ask."""
        since = time.monotonic() - seconds
        mine = [death for death in self._deaths if death.engine == engine and death.at >= since]
        return sum(death.explained for death in mine)

    def _note(self, death: EngineDeath, there: list[Present], in_turn: Present | None) -> None:
        """Suspect all requests that were there, once their fingerprints are known."""
        self._deaths = (*self._deaths, death)[-_MOST_DEATHS:]
        begun = [present.begun for present in there]
        death.concluding = asyncio.ensure_future(self._conclude(death, there, begun, in_turn))

    async def _conclude(
        self,
        death: EngineDeath,
        there: list[Present],
        begun: list[bool],
        in_turn: Present | None,
    ) -> None:
        names = [
            await asyncio.shield(present.fingerprint)
            for present in there
            if present.fingerprint is not None
        ]
        for present, name, answering in zip(there, names, begun, strict=True):
            mine = present is in_turn
            suspected = mine or in_turn is None
            if suspected:
                death.suspects[name] = present.client
            for who in (name, present.client):
                death.accuse(who, in_turn=mine, begun=answering and suspected)
        if in_turn is not None:
            others = [b for present, b in zip(there, begun, strict=True) if present is not in_turn]
            self._conclude_turn(in_turn, names[there.index(in_turn)], others)
        self._look_for_client()

    def _conclude_turn(self, in_turn: Present, name: str, others_begun: list[bool]) -> None:
        """Refuse the request of a turn if the answers of all others that were there had begun."""
        if in_turn.turn is not None and in_turn.turn.name == name and all(others_begun):
            self._refuse(name, [death for death in self._deaths if name in death.suspects])

    def _unexplained(self) -> list[EngineDeath]:
        since = time.monotonic() - _HOUR
        return [death for death in self._deaths if death.at > since and not death.explained]

    def _look_for_client(self) -> None:
        """Refuse the only client that was at each of the last deaths, if other clients exist."""
        since = time.monotonic() - _HOUR
        last = self._deaths[-CLIENT_DEATHS:]
        if len(last) < CLIENT_DEATHS or last[0].at < since:
            return
        clients = reduce(set.intersection, (set(death.suspects.values()) for death in last))
        others = any(at > since for name, at in self._clients.items() if name not in clients)
        if len(clients) == 1 and others:
            self._refuse(clients.pop(), last, client=True)

    def _refuse(self, name: str, deaths: Sequence[EngineDeath], *, client: bool = False) -> None:
        """Refuse a fingerprint or a client; this explains the deaths at which it was."""
        deaths[-1].refused.append(name)
        for death in deaths:
            death.explained = True
        for death in self._deaths:
            death.accused.pop(name, None)
        self.file.deny(name, len(deaths), _HOUR if client else DAY_SECONDS, client=client)
        self.count("convicted_total")
        _LOG.info("%s is refused: %d engines ended with it", name, len(deaths))
        self.keep()

    def _take_back(self, death: EngineDeath) -> None:
        self._deaths = tuple(other for other in self._deaths if other is not death)
        for name in death.refused:
            self._forget(name)
            self.file.pardon(name)
        self.keep()

    def _forget(self, name: str) -> None:
        for death in self._deaths:
            death.accused.pop(name, None)
            for fingerprint, client in tuple(death.suspects.items()):
                if name in (fingerprint, client):
                    del death.suspects[fingerprint]

    # -- storing and counting

    @property
    def suspected(self) -> int:
        """The number of suspected requests and clients."""
        return len({name for death in self._unexplained() for name in death.accused})

    def keep(self) -> None:
        """Write the refused ones soon, one write at a time; again while a disk is full."""
        if self.file.unwritten and (self._keeping is None or self._keeping.done()):
            self._keeping = asyncio.ensure_future(self._keep())

    async def _keep(self) -> None:
        while self.file.unwritten:
            if not await self.file.write():
                await asyncio.sleep(_AGAIN_SECONDS)

    async def close(self) -> None:
        """Wait until all is concluded and written; a full disk is tried once more."""
        for death in self._deaths:
            if death.concluding is not None and not death.concluding.done():
                await death.concluding
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
            self._keeping = None
        if self.file.unwritten:
            await self.file.write()


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at))
