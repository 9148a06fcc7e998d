"""The engines behind the gateway: what each is doing, and which one is next."""

from __future__ import annotations

import time
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Affinity", "Engine", "least_busy"]

#: Prefixes shorter than this many bytes of JSON are not worth a detour.
_SHORTEST_PREFIX: Final = 2048
_REMEMBERED: Final = 8192
#: A prefix's own engine may have so many requests more than the least busy one.
_DETOUR: Final = 4


class Engine:
    """One engine.

    Args:
        index: its number, which metrics and logs show.
        url: its address, without a final slash.
        share: how many requests it takes beside the others' shares.
    """

    def __init__(self, index: int, url: str, share: float = 1.0) -> None:
        self.index, self.url, self.share = index, url.rstrip("/"), share
        #: Whether requests go there; it starts in doubt's favour.
        self.up = True
        self.outstanding = 0
        self.units = 0
        self.host_bytes = 0
        #: Failed probes in a row.
        self.failures = 0
        self.model: str | None = None
        now = time.monotonic()
        #: When a completion last brought a byte, and when anything last did.
        self.last_success = float("-inf")
        self.last_byte = now
        #: Something failed: probe soon.
        self.suspect = True
        self.aborts: set[Callable[[], None]] = set()

    def succeeded(self) -> None:
        """A completion brought its first byte."""
        self.last_success = self.last_byte = time.monotonic()
        self.failures = 0
        self.suspect = False

    def heard(self) -> None:
        """A byte came."""
        self.last_byte = time.monotonic()

    def abort_all(self) -> None:
        """End every request that waits for this engine."""
        for abort in tuple(self.aborts):
            abort()


def least_busy(engines: Sequence[Engine]) -> Engine:
    """The one that one more request fills least; of equals the one with the fewest units.

    Full is relative to an engine's share: one of twice the share gets twice the requests.
    """
    return min(
        engines,
        key=lambda one: ((one.outstanding + 1) / one.share, one.units / one.share, one.index),
    )


class Affinity:
    """Keeps requests that share a long beginning on one engine, whose cache then holds it.

    Beginnings are known by hashes of whole messages; the last few thousand are remembered.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, int] = OrderedDict()

    def chooser(self, body: dict[str, Any]) -> Callable[[Sequence[Engine]], Engine]:
        """How to choose an engine for a request with this body."""
        prefixes = _prefixes(body)

        def choose(engines: Sequence[Engine]) -> Engine:
            best = least_busy(engines)
            for prefix in reversed(prefixes):
                home = self._known.get(prefix)
                near = next((engine for engine in engines if engine.index == home), None)
                if near is not None and near.outstanding <= best.outstanding + _DETOUR:
                    best = near
                    break
            for prefix in prefixes:
                self._known[prefix] = best.index
                self._known.move_to_end(prefix)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            return best

        return choose


def _prefixes(body: dict[str, Any]) -> list[bytes]:
    """Hashes of the request up to each message, the short ones left out."""
    state = blake2b(digest_size=16)
    found, length = [], 0
    messages = body.get("messages")
    parts = messages if isinstance(messages, list) else [body.get("prompt")]
    for part in (body.get("system"), body.get("tools"), *parts):
        data = msgspec.json.encode(part)
        state.update(data)
        length += len(data)
        if length >= _SHORTEST_PREFIX:
            found.append(state.copy().digest())
    return found
