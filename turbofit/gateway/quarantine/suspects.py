"""Which requests engines may have died of: suspected, convicted, cleared. Pure: no I/O, no clock.

- A request that was in flight at the death of an engine is suspected. It may run again only alone
  on an engine (`trials` sees to that). An answer clears it.
- A suspect that is in flight at another death, and alone there but for equal ones, is convicted: it
  is refused for a day. So is one whose client left shortly before, where nothing else was there, or
  where it had nothing else until its client left, as shortly before an earlier death too. A
  conviction explains each death that the request was at: the others who were there are suspected
  less, and their clients not at all. They still run alone once: two killing requests may have been
  at the same death.
- A death that had another cause (somebody killed the process, a GPU is lost) accuses nobody:
  `absolve`.

Over: a death whose request is never sent again leaves all who were beside it suspected for an hour;
equal requests that are alone together at two deaths of another cause, which no supervisor tells of,
are convicted.
Under: a request that kills only beside others is cleared whenever it runs alone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.gateway.quarantine.accounts import Accounts
from turbofit.gateway.quarantine.quarantined import (
    CONVICTED_SECONDS,
    EXPLAINED_SECONDS,
    SUSPECTED_SECONDS,
    Conviction,
    Quarantined,
    Suspicion,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from turbofit.gateway.quarantine.quarantined import Accused, EngineDeath

__all__ = ["Suspects"]

#: The oldest are dropped beyond so many.
_MOST_SUSPECTS: Final = 4096
_MOST_CONVICTED: Final = 1024
_MOST_DEATHS: Final = 256


class Suspects:
    """All suspects of a gateway.

    Args:
        clock: the time, in seconds; near that of the wall where what it knows is to be kept.
        saved: what was kept.
    """

    def __init__(self, clock: Callable[[], float], saved: Quarantined | None = None) -> None:
        self._clock = clock
        self._suspects: OrderedDict[str, Suspicion] = OrderedDict()
        self._convicted: OrderedDict[str, Conviction] = OrderedDict()
        #: Who was pardoned, whose suspicion was cleared and whose conviction was withdrawn, and
        #: when: what others have written down of an earlier time counts no more.
        self._forgotten: dict[str, float] = {}
        self._cleared: dict[str, float] = {}
        self._withdrawn: dict[str, float] = {}
        #: Deaths by the fingerprints of their suspects.
        self._of: dict[str, list[EngineDeath]] = {}
        #: Of all suspects and convicted; None where some came or went since.
        self._sketches: set[str] | None = None
        self._explained: tuple[tuple[int, float], ...] = ()
        self.accounts = Accounts(clock)
        self.merge(saved or Quarantined())

    def knows(self, sketch: str) -> bool:
        """Whether a request with this sketch may be a suspect, or convicted."""
        if self._sketches is None:
            suspected = {one.sketch for one in self._suspects.values()}
            self._sketches = suspected.union(one.sketch for one in self._convicted.values())
        return sketch in self._sketches

    def suspicion(self, fingerprint: str) -> Suspicion | None:
        """What is held against a request, if anything still is."""
        found = self._suspects.get(fingerprint)
        if found is None or found.until > self._clock():
            return found
        self._drop(fingerprint)
        return None

    def conviction(self, fingerprint: str) -> Conviction | None:
        """Since when, until when and why a request is refused, if it is."""
        found = self._convicted.get(fingerprint)
        if found is None or found.until > self._clock():
            return found
        del self._convicted[fingerprint]
        self._sketches = None
        return None

    @property
    def number(self) -> tuple[int, int]:
        """How many are suspected, and how many convicted."""
        now = self._clock()
        suspected = sum(one.until > now for one in self._suspects.values())
        return suspected, sum(one.until > now for one in self._convicted.values())

    def accuse(self, death: EngineDeath, accused: Accused) -> Conviction | None:
        """A request was in flight when an engine died.

        Returns:
            Its conviction, where it was a suspect before and alone at this death.
        """
        name = accused.fingerprint
        if death.explained or name in self._convicted:
            return None
        if not death.accused:
            death.at = self._clock()
        before, known = self.suspicion(name), death.accused.get(name)
        deaths = 0 if before is None else before.deaths
        if known is None:
            self._of.setdefault(name, []).append(death)
        elif before is None or known.alone or not accused.alone:
            return None
        else:
            # An equal one that was not alone, as one whose client left, was told of first.
            self.accounts.refund(death, known.accounts)
            deaths -= 1
        death.accused[name] = accused
        self._charge(death, accused)
        if before is not None and deaths and accused.alone:
            death.convicted = msgspec.structs.replace(before, deaths=deaths)
            earlier = self._of.get(name, ())
            death.explains = tuple(one for one in earlier if one is not death)
            return self._convict(accused, deaths + 1)
        self._suspects[name] = Suspicion(
            fingerprint=name,
            sketch=accused.sketch,
            deaths=deaths + 1,
            last=self._clock(),
            until=self._clock() + SUSPECTED_SECONDS,
            weight=0.0,
            begun=accused.begun or (before is not None and before.begun),
            left=accused.left or (before is not None and before.left),
        )
        self._suspects.move_to_end(name)
        while len(self._suspects) > _MOST_SUSPECTS:
            self._drop(next(iter(self._suspects)))
        self._sketches = None
        return None

    def weight(self, fingerprint: str) -> float:
        """How much a suspect is suspected: more by a death that few others shared."""
        deaths = self._of.get(fingerprint, ())
        found = self._suspects.get(fingerprint)
        kept = found.weight if found is not None else 0.0
        return kept + sum(1 / len(death.accused) for death in deaths)

    def acquit(self, fingerprint: str, accounts: Iterable[str]) -> bool:
        """An engine answered a request to its end; whether it was a suspect until now."""
        self.accounts.answered(accounts)
        if fingerprint not in self._suspects:
            return False
        for death in self._of.get(fingerprint, ()):
            accused = death.accused[fingerprint]
            self.accounts.refund(death, accused.accounts)
        self._clear(self._suspects[fingerprint])
        self._sketches = None
        return True

    def absolve(self, death: EngineDeath) -> None:
        """An engine died of something else: it accuses nobody, nor has it convicted anybody."""
        self._explain(death, drop=True)
        for accused in death.accused.values():
            self.accounts.refund(death, accused.accounts, proved=True)
        before = death.convicted
        if before is not None and before.fingerprint in self._convicted:
            conviction = self._convicted.pop(before.fingerprint)
            _note(self._withdrawn, conviction.fingerprint, conviction.since)
            self._suspects[before.fingerprint] = before
            mistaken = {(one.engine, one.at) for one in (death, *death.explains)}
            self._explained = tuple(one for one in self._explained if one not in mistaken)
            for earlier in death.explains:
                self._unexplain(earlier)
        self._sketches = None

    def explained(self, engine: int, seconds: float) -> int:
        """Deaths of an engine by convicted requests within so many seconds; any thread may ask."""
        since = self._clock() - seconds
        return sum(one == engine and at >= since for one, at in self._explained)

    def forget(self, fingerprint: str) -> bool:
        """Pardon a request, or a client by the name of its account; whether there was anything.

        Whatever is known is pardoned, though another process's clock may be ahead. Over: until the
        time by that clock, what comes later is pardoned too.
        """
        suspect, convicted = self._suspects.get(fingerprint), self._convicted.get(fingerprint)
        times = [self._clock(), self.accounts.newest(fingerprint)]
        times += [suspect.last] if suspect is not None else []
        times += [convicted.since] if convicted is not None else []
        known = suspect is not None or convicted is not None
        known = self.accounts.forget(fingerprint, max(times)) or known
        _note(self._forgotten, fingerprint, max(times))
        self._convicted.pop(fingerprint, None)
        self._drop(fingerprint)
        self._sketches = None
        return known

    def state(self) -> Quarantined:
        """What is to be kept."""
        now = self._clock()
        suspects = [self.suspicion(name) for name in tuple(self._suspects)]
        convicted = [self.conviction(name) for name in tuple(self._convicted)]
        return Quarantined(
            suspects=tuple(
                msgspec.structs.replace(one, weight=self.weight(one.fingerprint))
                for one in suspects
                if one is not None
            ),
            convicted=tuple(one for one in convicted if one is not None),
            clients=self.accounts.state(),
            forgotten=_since(self._forgotten, now - CONVICTED_SECONDS),
            cleared=_since(self._cleared, now - SUSPECTED_SECONDS),
            withdrawn=_since(self._withdrawn, now - CONVICTED_SECONDS),
        )

    def merge(self, saved: Quarantined) -> None:
        """Take over what others have written: all that is newer, and what was taken back."""
        for mine, others in (
            (self._forgotten, saved.forgotten),
            (self._cleared, saved.cleared),
            (self._withdrawn, saved.withdrawn),
        ):
            for name, at in others.items():
                _note(mine, name, at)
        for conviction in saved.convicted:
            known_one = self._convicted.get(conviction.fingerprint)
            if known_one is None or known_one.since < conviction.since:
                self._convicted[conviction.fingerprint] = conviction
        self.accounts.merge(saved.clients)
        for name, at in self._forgotten.items():
            self.accounts.forget(name, at)
        for name, at in (*self._forgotten.items(), *self._withdrawn.items()):
            if name in self._convicted and self._convicted[name].since <= at:
                del self._convicted[name]
        for suspect in saved.suspects:
            known = suspect.fingerprint in self._suspects or suspect.fingerprint in self._convicted
            if not known:
                self._suspects[suspect.fingerprint] = suspect
        for name, at in (*self._forgotten.items(), *self._cleared.items()):
            if name in self._suspects and self._suspects[name].last <= at:
                self._drop(name)
        self._sketches = None

    def _convict(self, accused: Accused, engines: int) -> Conviction:
        now, name = self._clock(), accused.fingerprint
        conviction = Conviction(
            fingerprint=name,
            sketch=accused.sketch,
            since=now,
            until=now + CONVICTED_SECONDS,
            engines=engines,
        )
        deaths = self._of.get(name, [])
        self._explained = (
            *(one for one in self._explained if one[1] + CONVICTED_SECONDS > now),
            *((death.engine, death.at) for death in deaths),
        )[-_MOST_DEATHS:]
        for death in tuple(deaths):
            self._explain(death)
            for one in death.accused.values():
                mine = one.fingerprint == name
                if mine:
                    self.accounts.charge(death, one.accounts, proved=True)
                else:
                    self.accounts.refund(death, one.accounts)
        self._drop(name)
        self._convicted[name] = conviction
        while len(self._convicted) > _MOST_CONVICTED:
            self._convicted.popitem(last=False)
        self._sketches = None
        return conviction

    def _explain(self, death: EngineDeath, *, drop: bool = False) -> None:
        """A death has a cause: who was there is suspected less, or not at all for it."""
        death.explained = True
        soon = self._clock() + EXPLAINED_SECONDS
        for name in death.accused:
            left = [one for one in self._of.get(name, ()) if one is not death]
            known = self._suspects.get(name)
            self._of[name] = left
            if left or known is None:
                continue
            if drop:
                self._clear(known)
            else:
                self._suspects[name] = msgspec.structs.replace(known, until=min(known.until, soon))

    def _unexplain(self, death: EngineDeath) -> None:
        """The convicted request did not cause it: whoever is still suspected is so as before.

        Over: it counts for its clients from now on, not from then.
        """
        death.explained = False
        for name, accused in death.accused.items():
            known = self._suspects.get(name)
            if known is None:
                continue
            until = max(known.until, known.last + SUSPECTED_SECONDS)
            self._suspects[name] = msgspec.structs.replace(known, until=until)
            self._of.setdefault(name, []).append(death)
            self.accounts.refund(death, accused.accounts, proved=True)
            self._charge(death, accused)

    def _charge(self, death: EngineDeath, accused: Accused) -> None:
        """Count a death for a client: whole where its request was the only one there."""
        proved = accused.alone and not accused.equal_beside
        self.accounts.charge(death, accused.accounts, proved=proved, begun=accused.begun)

    def _clear(self, suspicion: Suspicion) -> None:
        """It is suspected no more, here or by others, whose clock may be ahead."""
        _note(self._cleared, suspicion.fingerprint, max(self._clock(), suspicion.last))
        self._drop(suspicion.fingerprint)

    def _drop(self, fingerprint: str) -> None:
        self._suspects.pop(fingerprint, None)
        self._of.pop(fingerprint, None)


def _note(times: dict[str, float], name: str, at: float) -> None:
    """Note the newest time of a name; the oldest notes are dropped beyond so many."""
    times[name] = max(at, times.pop(name, at))
    while len(times) > _MOST_SUSPECTS:
        del times[next(iter(times))]


def _since(times: dict[str, float], since: float) -> dict[str, float]:
    return {name: at for name, at in times.items() if at > since}
