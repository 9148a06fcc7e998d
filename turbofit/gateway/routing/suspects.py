"""What `deny_list` notes of requests at engines, of suspects, and of engines' deaths."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from turbofit.core.struct import Struct

if TYPE_CHECKING:
    import asyncio

    from turbofit.gateway.routing.deny_file import Fingerprint

__all__ = ["LEFT_SECONDS", "EngineDeath", "ForwardOutcome", "Present", "Suspicion", "Turn"]

#: Seconds for which an engine is counted on to have a request whose client left: of an answer in
#: one piece LMDeploy notices that only at the next token (`serve/core/chat_runner.py`, collect). A
#: stream that has begun it ends at once. Under: a first token that takes longer.
LEFT_SECONDS: Final = 10.0


class Turn:
    """A suspect's turn at an engine.

    ``name``: the fingerprint or the client that is suspected; it has one turn at a time.
    ``alone``: the engine gets nothing new meanwhile. ``longer``: it goes on after the answer began.
    """

    __slots__ = ("alone", "longer", "name")

    def __init__(self, name: str, *, alone: bool, longer: bool) -> None:
        self.name, self.alone, self.longer = name, alone, longer


class Present:
    """A request at an engine, as far as a death asks: what, whose, and how far it had come."""

    __slots__ = ("begun", "client", "fingerprint", "left_at", "sent_at", "turn")

    def __init__(self, fingerprint: Fingerprint, client: str) -> None:
        self.fingerprint, self.client = fingerprint, client
        self.turn: Turn | None = None
        #: Whether a byte of its answer came; when it was sent, and when its client left.
        self.begun, self.sent_at, self.left_at = False, float("-inf"), float("inf")


class Suspicion(Struct):
    """Of a request or a client: ``deaths`` in turns, and the first; ``begun`` as in `Turn`."""

    deaths: int
    begun: bool
    until: float


class EngineDeath:
    """The end of one engine's process: who was there, and what was concluded."""

    __slots__ = ("at", "before", "engine", "explained", "refused", "seen", "suspects", "told")

    def __init__(self, engine: int) -> None:
        self.engine, self.at = engine, time.monotonic()
        #: Clients by the fingerprints of their requests that may be the cause.
        self.suspects: dict[str, str] = {}
        #: What was known of each before.
        self.before: dict[str, Suspicion | None] = {}
        #: Who was refused for it.
        self.refused: list[str] = []
        #: Its cause is known; and a supervisor has seen the process end.
        self.explained = self.seen = False
        #: Done once all of them are suspected.
        self.told: asyncio.Task[None] | None = None


class ForwardOutcome:
    """What became of a request at one engine."""

    __slots__ = (
        "answered", "broken", "bytes_out", "death", "events", "failed", "first_byte", "started",
        "status", "stuck", "tail", "vanished",
    )  # fmt: skip

    def __init__(self) -> None:
        self.status = 0
        self.bytes_out = 0
        self.first_byte: float | None = None
        self.started = False
        #: A byte of the answer came from the engine.
        self.answered = False
        #: The exchange ended before the answer was whole.
        self.broken = False
        #: The engine ended, or was given up. None: its machine vanished, or it was drained.
        self.death: EngineDeath | None = None
        #: The engine's machine does not answer any more, it seems.
        self.vanished = False
        #: The engine lives, and sent nothing of this answer.
        self.stuck = False
        #: The engine answered that it cannot serve.
        self.failed = False
        #: Events of a stream that came, and the last bytes of an answer that hold a usage.
        self.events = 0
        self.tail = b""
