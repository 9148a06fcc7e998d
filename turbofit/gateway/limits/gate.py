"""Limits the vision units at an engine to the units that the plan allows in one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from turbofit.core.struct import Struct

#: A number of tokens without a limit: of a request whose answer has no stated length, or of a KV
#: cache that cannot become full.
UNSTATED: Final = 1 << 62

#: An upper bound of the tokens that a chat template adds: LMDeploy's longest system prompt has 509
#: bytes, and the JSON of a message is longer than the message in the template. A checkpoint's own
#: template may add more. lmdeploy lmdeploy/model.py::InternVLZH.__init__ #f65e84
TEMPLATE_TOKENS: Final = 640

#: The most seconds of processor time that grammars may add to a token of all clients, if all are
#: at their dearest token: as long as a prefill of some thousand tokens takes, for which everybody
#: waits as well. It is enough for twenty strings of ``maxLength`` 255, or for five of the dearest
#: grammars that are let in.
STEP_SECONDS: Final = 0.5


class Cost(Struct):
    """The amounts of an engine's resources that one request uses.

    ``units`` and ``host_bytes`` count all ``copies`` of the request; ``tokens`` is the most tokens
    of the KV cache that one copy can use, and ``answer`` the part of them that is its answer.
    ``token_seconds`` is the processor time that the grammars of all copies take at their dearest
    token (see `grammar_trials`).
    """

    units: int = 0
    host_bytes: int = 0
    tokens: int = 0
    copies: int = 1
    answer: int = 0
    token_seconds: float = 0.0

    @property
    def light(self) -> bool:
        """Whether the request has no images, and no dear grammar."""
        return not (self.units or self.host_bytes or self.token_seconds)


class KvCache(Struct):
    """Sizes of an engine's KV cache.

    ``tokens``, ``longest`` and ``block`` are numbers of tokens: of the cache, of the longest
    request, and of a block. For each copy of a request the engine takes ``ahead`` blocks in
    addition to the blocks for its tokens.
    """

    tokens: int = 0
    longest: int = 0
    block: int = 1
    ahead: int = 0

    @property
    def room(self) -> int:
        """The number of tokens that requests may reserve without an eviction.

        The rest of the cache is for the requests of `Upstream.probe`.
        """
        return max(0, self.tokens - TEMPLATE_TOKENS)

    def reservation(self, cost: Cost) -> int:
        """Return an upper bound of the tokens of all copies of a request, in whole blocks."""
        if not cost.tokens:
            return 0
        blocks = -(-min(cost.tokens, self.longest) // self.block) + self.ahead
        return cost.copies * blocks * self.block


@dataclass
class Share:
    """The vision units and KV tokens that a running request takes of its engine.

    ``number``: how many requests the engine has had so far. ``begun``: the first token has come.
    """

    number: int
    cost: Cost
    tokens: int
    begun: bool = False


class Gate:
    """Limits the requests at one engine so that no forward encodes more than ``units`` units.

    If ``units`` is None, there is no limit. ``kv`` is the engine's KV cache.
    """

    def __init__(self, units: int | None = None, kv: KvCache | None = None) -> None:
        self.units, self.kv = units, kv or KvCache()
        #: Tokens that the running requests reserve.
        self.reserved = 0
        #: Units of all running requests; of those in doubt; and of those that are not in doubt and
        #: have no first token yet.
        self._all = self._in_doubt = self._until_begun = 0
        #: The number of the last request, and of the last request that may have been evicted.
        self._number = self._doubtful = 0

    @property
    def counted(self) -> int:
        """The units that one forward may contain together."""
        return self._in_doubt + self._until_begun

    def fits(self, cost: Cost) -> bool:
        """Return whether a request may be sent to the engine now, so that no forward is too large.

        The rule, and then the proof that no forward ever has more units than the gate.

        The units of a request *count* until its first token. If the request ran together with
        requests that reserved more tokens than the cache has, it is *in doubt*, and its units count
        until its end. A new request is let in if the counted units and its own units are together
        within the gate:

        - If the reserved tokens, with the new request's, are within the cache, units count of the
        new request, of requests before their first token, and of requests in doubt.
        - Otherwise the new request puts all running requests in doubt, so all units count.

        The proof: the engine encodes an image before the first token of its request, and again only
        after it has evicted the request's blocks.

        1. The engine evicts a block of an unfinished request only if the unfinished requests need
        more blocks than the cache has. Each request needs at most its reservation, in whole blocks:
        the engine itself ends an answer at its stated length.
        Blocks of a prefix cache and of finished requests are evicted first. A block that several
        requests share is part of each reservation. So if any request is evicted, the requests that
        run at that moment have reserved more than the cache has.
        2. While reservations exceed the cache, every request is let in by the second case above,
        which puts the new request and all running requests in doubt. So a request that may be
        evicted is in doubt, and stays so until its end.
        3. So every request counts whose images may be in one forward: the request is before its
        first token, or in doubt. The counted units are within the gate when a request is let in,
        and grow at no other time.

        A request that states no length may fill the rest of its session. No rule that watches its
        answer grow keeps the promise: whatever the gateway sees is late, and an engine does not
        wait for who watches. When several long answers have filled the cache, the engine evicts
        others, and encodes all their images again at once. Only a length that the engine keeps is a
        bound, so such a request is given one (`Bounds.answer_tokens`).

        Copies (``n``) are separate requests to the engine. The caller counts the units of every
        copy, and calls `begin` when it knows the first token of each of them. The requests
        of an engine's last process count until their connections are closed, which may be longer
        than necessary. A request whose client leaves ends when the engine has dropped the request;
        the caller waits for this moment (`Exchange`).
        """
        if self.units is None or not (cost.units or cost.tokens):
            return True
        return (self._all if self.over(cost) else self.counted) + cost.units <= self.units

    def fits_soon(self, cost: Cost) -> bool:
        """Return whether a request will fit once the requests before it have their first tokens."""
        if self.units is None:
            return True
        return not self.over(cost) and self._in_doubt + cost.units <= self.units

    def over(self, cost: Cost) -> bool:
        """Return whether the running requests and this one reserve more than the cache has."""
        return self.reserved + self.kv.reservation(cost) > self.kv.room

    def lacks(self, cost: Cost) -> str:
        """Return what a request waits for that does not fit; empty if it fits."""
        if self.units is None or self.fits(cost):
            return ""
        if self.counted + cost.units <= self.units:
            return "room in the KV cache"
        return "the first tokens of the image requests before it"

    def take(self, cost: Cost) -> Share:
        """Count a request that is sent to the engine, even if it does not fit.

        Return the request's share; the caller passes the share to `end` when the request ends.
        """
        self._number += 1
        share = Share(self._number, cost, self.kv.reservation(cost))
        self.reserved += share.tokens
        self._all += share.cost.units
        self._until_begun += share.cost.units
        if self.units is not None and self.reserved > self.kv.room:
            # The engine may evict any running request, and encode its images again.
            self._doubtful, self._in_doubt, self._until_begun = self._number, self._all, 0
        return share

    def begin(self, share: Share, prompt: int = 0) -> None:
        """Note that the first token of each copy of a request came.

        From now on the units of the request do not count, unless it is in doubt (see `fits`). If
        the tokens of its ``prompt`` are known, it reserves these and its answer: the gateway itself
        has no tokenizer, and reserved a token for each byte.
        """
        if prompt:
            needed = replace(share.cost, tokens=prompt + share.cost.answer)
            less = share.tokens - self.kv.reservation(needed)
            share.tokens, self.reserved = share.tokens - less, self.reserved - less
        if not share.begun and share.number > self._doubtful:
            self._until_begun -= share.cost.units
        share.begun = True

    def end(self, share: Share) -> None:
        self.reserved -= share.tokens
        self._all -= share.cost.units
        if share.number <= self._doubtful:
            self._in_doubt -= share.cost.units
        elif not share.begun:
            self._until_begun -= share.cost.units
