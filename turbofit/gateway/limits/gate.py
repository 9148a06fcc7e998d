"""Which requests may be at an engine together, where the plan paid for few units in a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from turbofit.core.struct import Struct

#: Tokens of a request that may grow as long as the engine lets it.
UNSTATED: Final = 1 << 62

#: What a chat template adds by itself: the longest system prompt of LMDeploy's templates has 509
#: bytes. Over; under for a checkpoint's own template that adds more. What it adds to a message is
#: less than the JSON around it. lmdeploy lmdeploy/model.py::InternVLZH.__init__ #f65e84
TEMPLATE_TOKENS: Final = 640


class Cost(Struct):
    """What one request holds of an engine.

    ``units`` and ``host_bytes`` are those of all its ``copies``, ``tokens`` the most that one of
    them can hold of the KV cache.
    """

    units: int = 0
    host_bytes: int = 0
    tokens: int = 0
    copies: int = 1

    @property
    def light(self) -> bool:
        """Whether it has no images."""
        return not self.units and not self.host_bytes


class KvCache(Struct):
    """An engine's KV cache, in tokens: its size, the longest request, a block.

    ``ahead``: blocks of each copy beyond its longest.
    """

    tokens: int = 0
    longest: int = 0
    block: int = 1
    ahead: int = 0

    @property
    def room(self) -> int:
        """Tokens that requests may reserve without an eviction, beside `Upstream.probe`."""
        return max(0, self.tokens - TEMPLATE_TOKENS)

    def reservation(self, cost: Cost) -> int:
        """Tokens that all copies of a request can ever hold, in whole blocks. Over."""
        if not cost.tokens:
            return 0
        blocks = -(-min(cost.tokens, self.longest) // self.block) + self.ahead
        return cost.copies * blocks * self.block


@dataclass
class Share:
    """What a request in flight has of an engine; ``number`` counts requests."""

    number: int
    units: int
    tokens: int
    begun: bool = False


class Gate:
    """The requests in flight at one engine, a forward of which may have so many ``units``."""

    def __init__(self, units: int | None = None, kv: KvCache | None = None) -> None:
        self.units, self.kv = units, kv or KvCache()
        #: Tokens that the requests in flight reserve.
        self.reserved = 0
        #: Units that one forward may bring together, and those of all requests in flight.
        self.counted = self._all = 0
        #: The last request's number, and the last that may have been evicted.
        self._number = self._doubtful = 0

    def fits(self, cost: Cost) -> bool:
        """Whether a request may be sent to the engine now.

        The units of a request *count* until its first token; and until its end where it was in
        flight together with requests that reserved more tokens than the cache has. One more
        request is let in where what counts with it there stays within the gate:

        - the reserved tokens, its own included, are within the cache: what counts are its own
          units, those of requests before their first token, and of those in doubt;
        - they are not: it puts all that are in flight in doubt, and so the units of all count.

        No forward ever has more units than the gate. The engine encodes an image before the first
        token of its request, and again only after it has evicted the request's blocks.

        1. It evicts a block of a request that is not finished only where those requests need more
           blocks than there are. Each needs no more than it has reserved, rounded up to blocks;
           blocks that a prefix cache keeps, or that a finished request leaves, go first, and blocks
           that several share are reserved by each. So if any request is evicted, more was reserved
           than the cache has, at that moment, by those in flight at that moment.
        2. More is reserved than the cache has only after a request was let in by the second rule,
           and until enough of those there have ended: reservations grow in no other way. That rule
           put in doubt all who were there, and itself; and whoever is let in while too much is
           reserved comes by that rule too. So an evicted request is in doubt, until its end.
        3. So what a forward can bring together counts: it is before its first token, or in doubt.
           What counts is within the gate when a request is let in, and at no other time does it
           grow.

        - Copies (``n``) are requests of their own to the engine: the caller counts the units of
          each and does not call `begin`, since the first byte tells only about one.
        - What the last process of an engine had counts until its connections are closed. Over.
        - A client that leaves ends its request when the engine has dropped it, which is the
          caller's to wait for (`Exchange`).
        """
        if self.units is None or not (cost.units or cost.tokens):
            return True
        over = self.reserved + self.kv.reservation(cost) > self.kv.room
        return (self._all if over else self.counted) + cost.units <= self.units

    def take(self, cost: Cost) -> Share:
        """A request is sent, whether it fits or not; its share ends it."""
        self._number += 1
        share = Share(self._number, cost.units, self.kv.reservation(cost))
        self.reserved += share.tokens
        self._all += share.units
        self.counted += share.units
        if self.units is not None and self.reserved > self.kv.room:
            # Any of the requests in flight may be evicted, and its images encoded again.
            self._doubtful, self.counted = self._number, self._all
        return share

    def begin(self, share: Share) -> None:
        """Its first token came."""
        if not share.begun and share.number > self._doubtful:
            self.counted -= share.units
        share.begun = True

    def end(self, share: Share) -> None:
        self.reserved -= share.tokens
        self._all -= share.units
        if not share.begun or share.number <= self._doubtful:
            self.counted -= share.units
