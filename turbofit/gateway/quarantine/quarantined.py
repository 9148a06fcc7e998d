"""What `suspects` knows of a request: accused, suspected, convicted; and what is kept of it."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from turbofit.core.struct import Struct, const

__all__ = [
    "CONVICTED_SECONDS",
    "EXPLAINED_SECONDS",
    "QUARANTINE_SCHEMA",
    "SUSPECTED_SECONDS",
    "Accused",
    "Conviction",
    "EngineDeath",
    "Quarantined",
    "Suspicion",
]

QUARANTINE_SCHEMA: Final = "turbofit.quarantine/1"
#: How long a suspect that does not come again is one, also where another is convicted of the same
#: death, and how long a conviction lasts.
SUSPECTED_SECONDS: Final = 3600.0
EXPLAINED_SECONDS: Final = 600.0
CONVICTED_SECONDS: Final = 24 * 3600.0


class Suspicion(Struct):
    """A request that was in flight at ``deaths`` deaths, the last one at ``last``.

    It is suspected until it is answered, or until ``until``. ``weight``: for each death one,
    divided by the requests that shared it. ``begun``: at one of them its answer had begun.
    ``left``: as for `Accused`, at one of them. After either it has its engine until its next answer
    ends, not only begins.
    """

    fingerprint: str
    sketch: str
    deaths: int
    last: float
    until: float
    weight: float
    begun: bool = False
    left: bool = False


class Conviction(Struct):
    """A request that is refused from ``since`` to ``until``; ``engines`` are the deaths."""

    fingerprint: str
    sketch: str
    since: float
    until: float
    engines: int


class Quarantined(Struct):
    """What is kept across restarts; times by `quarantine_file.kept_time`.

    ``forgotten``: fingerprints and clients that a person has pardoned, and when. ``cleared``: whose
    suspicion an answer or another cause ended. ``withdrawn``: of when the convictions were that had
    another cause.
    """

    schema: Annotated[str, const(QUARANTINE_SCHEMA)] = QUARANTINE_SCHEMA
    suspects: tuple[Suspicion, ...] = ()
    convicted: tuple[Conviction, ...] = ()
    clients: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    forgotten: dict[str, float] = msgspec.field(default_factory=dict)
    cleared: dict[str, float] = msgspec.field(default_factory=dict)
    withdrawn: dict[str, float] = msgspec.field(default_factory=dict)

    def none_ahead(self, now: float) -> Quarantined:
        """The same without dates after ``now``: the clock was set back since.

        They are moved together, so that the newest of them is ``now``. Over: the time since then
        counts as none.
        """
        times = [one.last for one in self.suspects] + [one.since for one in self.convicted]
        times += [at for deaths in self.clients.values() for at in deaths]
        for taken_back in (self.forgotten, self.cleared, self.withdrawn):
            times += taken_back.values()
        ahead = max([now, *times]) - now
        if not ahead:
            return self

        def off(at: float) -> float:
            return ahead if at > now else 0.0

        def moved(times: dict[str, float]) -> dict[str, float]:
            return {name: at - off(at) for name, at in times.items()}

        move = msgspec.structs.replace
        return Quarantined(
            suspects=tuple(
                move(one, last=one.last - off(one.last), until=one.until - off(one.last))
                for one in self.suspects
            ),
            convicted=tuple(
                move(one, since=one.since - off(one.since), until=one.until - off(one.since))
                for one in self.convicted
            ),
            clients={
                name: tuple(at - off(at) for at in deaths) for name, deaths in self.clients.items()
            },
            forgotten=moved(self.forgotten),
            cleared=moved(self.cleared),
            withdrawn=moved(self.withdrawn),
        )


class Accused(Struct):
    """A request at a death: whose, whether it was alone there, whether its answer had begun.

    ``equal_beside``: it was alone but for equal ones. ``left``: its client left before an answer
    began, shortly before the death.
    """

    fingerprint: str
    sketch: str
    accounts: tuple[str, ...] = ()
    alone: bool = False
    equal_beside: bool = False
    begun: bool = False
    left: bool = False


class EngineDeath:
    """The death of one engine: who was in flight, and whether it is explained."""

    __slots__ = ("accused", "at", "convicted", "engine", "explained", "explains", "seen")

    def __init__(self, engine: int) -> None:
        self.engine = engine
        self.at = 0.0
        self.accused: dict[str, Accused] = {}
        self.explained = False
        #: The suspicion by which it convicted a request, and the deaths that this explains.
        self.convicted: Suspicion | None = None
        self.explains: tuple[EngineDeath, ...] = ()
        #: A supervisor has seen the process end.
        self.seen = False
