"""How connections to simulated engines carry bytes, and how they end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

__all__ = ["Network"]

#: Seconds from which a rare day's are drawn: a busy server reads so much later, at most.
_DELAYS: Final = (0.0, 0.001, 0.01, 0.05)


@dataclass(frozen=True)
class Network:
    """Seconds that connections to engines take; on most days only ``connect`` takes any.

    ``connect``: until one is made. ``request``: until the engine reads a request. ``answer``: until
    the gateway reads a part of an answer. ``pause``: from the head of an answer to its body, and
    from the body to its end. ``early``: a stream's head comes before its first token, as LMDeploy's
    server sends it. ``orderly``: an engine's end closes its connections (FIN); else it resets them.

    An engine notices at once that a connection is closed (under: a real one goes on until it does).
    """

    connect: float = 0.0001
    request: float = 0.0
    answer: float = 0.0
    pause: float = 0.0
    early: bool = False
    orderly: bool = False

    @classmethod
    def drawn(cls, rare: random.Random) -> Network:
        """One for a rare day."""
        return cls(
            connect=rare.choice(_DELAYS[1:]), request=rare.choice(_DELAYS),
            answer=rare.choice(_DELAYS), pause=rare.choice((*_DELAYS, 0.5)),
            early=rare.random() < 0.75, orderly=rare.random() < 0.5,
        )  # fmt: skip
