"""Whether a request that its engine lost is sent to another engine: the rule, and nothing else.

An engine may have died of a request that it had, and the next engine would die of it too.

- The engine did not die: the request was never sent (nothing listened there), the engine's machine
  vanished, or the engine was drained or taken out of the routing table. The request is sent again.
- The engine died, and had no other request: this one is what it died of, as far as anybody can
  tell. It is not sent again, unless another engine had begun to answer it.
- The engine died, and others were in flight there: most of them are innocent. Each is sent again
  once, alone (`trials`), and only while at least two engines serve, so that the last one is never
  put at risk.
- A second engine died while it had the request: it is not sent again.

An engine that stops answering and is given up counts as dead. So one request ends one engine where
it is alone and two at most where it is not, and however many of its kind there are: sending them
again never ends the last engine that serves. `suspects` remembers them where their clients send
them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from turbofit.gateway.routing.exchange import EngineDied

if TYPE_CHECKING:
    from turbofit.gateway.routing.fleet import Fleet
    from turbofit.gateway.routing.forward_outcome import ForwardOutcome

__all__ = ["Retries", "withheld"]

#: Engines that may break off over one request before its client is told, dead or not.
_MOST_TRIES: Final = 3

#: Why a request is not sent again though another engine is up.
_Withheld = Literal["alone", "second_death", "last_engine", "tries"]

_MESSAGES: Final[dict[_Withheld, str]] = {
    "alone": "the inference engine ended while this was its only request: the request is not sent "
    "to another engine",
    "second_death": "two inference engines ended while they had this request: it is not sent to "
    "another engine",
    "last_engine": "the inference engine ended while it had this request, and only one other "
    "serves: the request is not sent there",
    "tries": f"{_MOST_TRIES} inference engines broke off while they had this request",
}


class Retries:
    """What became of one request at the engines that had it."""

    def __init__(self) -> None:
        self.tries = self.deaths = 0
        self._answered = False

    @property
    def last(self) -> bool:
        """Whether the next engine is the last that may have it."""
        return self.tries + 1 == _MOST_TRIES

    def why_withheld(self, outcome: ForwardOutcome, fleet: Fleet) -> _Withheld | None:
        """An engine broke off.

        Args:
            outcome: what became of the request there.
            fleet: all engines; the one that broke off is out already, where others are up.

        Returns:
            Why the request must not be sent again, or None where it may be.
        """
        self.tries += 1
        answered, self._answered = self._answered, self._answered or outcome.answered
        if outcome.death is not None:
            self.deaths += 1
            if outcome.alone and not outcome.equal_beside and not answered:
                return "alone"
        if self.deaths > 1:
            return "second_death"
        if self.tries == _MOST_TRIES:
            return "tries"
        return "last_engine" if self.deaths and not fleet.spare else None


def withheld(why: _Withheld) -> EngineDied:
    """What the client is told."""
    return EngineDied(_MESSAGES[why])
