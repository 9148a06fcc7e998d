"""What `deny_list` notes of requests at engines, of suspects, and of engines' deaths."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from turbofit.core.struct import Struct
from turbofit.gateway.routing.deny_file import Fingerprint

__all__ = ["LEFT_SECONDS", "EngineDeath", "ForwardOutcome", "Present", "Suspicion", "Turn"]

#: Seconds for which an engine is counted on to have a request whose client left: of an answer in
#: one piece LMDeploy notices that only at the next token (`serve/core/chat_runner.py`, collect). A
#: stream that has begun it ends at once. Under: a first token that takes longer.
LEFT_SECONDS: Final = 10.0


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

    ``begun``: whether a byte of its answer came. ``sent_at`` and ``left_at``: when it was sent, and
    when its client left.
    """

    fingerprint: Fingerprint
    client: str
    turn: Turn | None = None
    begun: bool = False
    sent_at: float = float("-inf")
    left_at: float = float("inf")


class Suspicion(Struct):
    """Of a request or a client: ``deaths`` in turns, and the first; ``begun`` as in `Turn`."""

    deaths: int
    begun: bool
    until: float


@dataclass(eq=False)
class EngineDeath:
    """The end of one engine's process: who was there, and what was concluded.

    ``suspects`` are clients by the fingerprints of their requests that may be the cause, ``before``
    is what was known of each before, ``refused`` who was refused for it. ``explained``: its cause
    is known. ``seen``: a supervisor has seen the process end. ``told`` is done once all of them are
    suspected.
    """

    engine: int
    at: float
    suspects: dict[str, str] = field(default_factory=dict)
    before: dict[str, Suspicion | None] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    explained: bool = False
    seen: bool = False
    told: asyncio.Task[None] | None = None


@dataclass(eq=False)
class ForwardOutcome:
    """What became of a request at one engine."""

    status: int = 0
    bytes_out: int = 0
    first_byte: float | None = None
    started: bool = False
    #: A byte of the answer came from the engine.
    begun: bool = False
    #: The exchange ended before the answer was whole.
    broken: bool = False
    #: The engine ended, or was given up. None: its machine vanished, or it was drained.
    death: EngineDeath | None = None
    #: The engine's machine does not answer any more, it seems.
    vanished: bool = False
    #: The engine lives, and sent nothing of this answer.
    stuck: bool = False
    #: The engine answered that it cannot serve.
    failed: bool = False
    #: Events of a stream that came, and the last bytes of an answer that hold a usage.
    events: int = 0
    tail: bytes = b""
