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
    """Seconds that connections to engines take; most days have none but ``connect``.

    ``connect``: until one is made. ``request``, ``answer``: until bytes are read by the engine, by
    the gateway. ``pause``: from the head of an answer to its body, and from there to its end.
    ``early``: a stream's head comes before its first token, as LMDeploy's server sends it.
    ``orderly``: an engine's end closes connections (FIN); else it resets them.

    That a connection is closed reaches the engine at once (under: it goes on for as long as
    ``request``).
    """

    connect: float = 0.0001
    request: float = 0.0
    answer: float = 0.0
    pause: float = 0.0
    early: bool = False
    orderly: bool = False

    @classmethod
    def drawn(cls, rare: random.Random) -> Network:
        """That of a rare day."""
        return cls(
            connect=rare.choice(_DELAYS[1:]), request=rare.choice(_DELAYS),
            answer=rare.choice(_DELAYS), pause=rare.choice((*_DELAYS, 0.5)),
            early=rare.random() < 0.75, orderly=rare.random() < 0.5,
        )  # fmt: skip
