"""What became of a request at one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turbofit.gateway.quarantine.quarantined import EngineDeath

__all__ = ["ForwardOutcome"]


class ForwardOutcome:
    """What became of the request, for the access log and for who is suspected."""

    __slots__ = (
        "alone", "answered", "arrivals", "broken", "bytes_out", "death", "equal_beside", "events",
        "failed", "first_byte", "started", "status", "stuck", "tail", "vanished",
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
        #: No other request was in flight there when it died, but for so many equal ones, as far as
        #: this gateway knows. Of equal ones only the first to break off is said to be alone.
        self.alone = False
        self.equal_beside = 0
        #: How many requests had come to the engine with it.
        self.arrivals = 0
        #: The engine's machine does not answer any more, it seems.
        self.vanished = False
        #: The engine lives, and sent nothing of this answer.
        self.stuck = False
        #: The engine answered that it cannot serve.
        self.failed = False
        #: Events of a stream that came, and the last bytes of an answer that hold a usage.
        self.events = 0
        self.tail = b""
