"""What became of a request at one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turbofit.gateway.quarantine.quarantined import EngineDeath

__all__ = ["ForwardOutcome"]


class ForwardOutcome:
    """What became of it, for the log."""

    __slots__ = (
        "alone", "answered", "arrivals", "broken", "bytes_out", "death", "events", "failed",
        "first_byte", "started", "status", "stuck", "tail", "vanished",
    )  # fmt: skip

    def __init__(self) -> None:
        self.status = 0
        self.bytes_out = 0
        self.first_byte: float | None = None
        self.started = False
        #: A byte of the answer came from the engine.
        self.answered = False
        #: The engine broke off.
        self.broken = False
        #: It ended, or was given up; else its machine vanished, or it was taken out.
        self.death: EngineDeath | None = None
        #: No other request was in flight there when it died, as far as this gateway knows.
        self.alone = False
        #: How many requests had come to the engine with it.
        self.arrivals = 0
        #: And so, it seems, did its machine.
        self.vanished = False
        #: It brought nothing of this answer, and lives.
        self.stuck = False
        #: It answered that it cannot.
        self.failed = False
        #: Events of a stream that came, and the last bytes of an answer that hold a usage.
        self.events = 0
        self.tail = b""
