"""What a request is known by, and who sent it, after its body is gone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from turbofit.gateway.quarantine.fingerprints import Fingerprints

__all__ = ["LEFT_SECONDS", "Departure", "RequestIdentity"]

#: Seconds for which an engine is counted on to have a request whose client left: of an answer in
#: one piece LMDeploy notices that only at the next token (`serve/core/chat_runner.py`, collect). A
#: stream that has begun it ends at once. Under: a first token that takes longer.
LEFT_SECONDS: Final = 10.0

#: Larger bodies are hashed in a thread, beside the engine that has them already.
_INLINE: Final = 64 << 10


class RequestIdentity:
    """A request's sketch at once, and its fingerprint soon.

    Args:
        fingerprints: of this installation.
        path: of the engine's route.
        body: as the engine is given it.
        accounts: whose it is, see `accounts.accounts_of`.
    """

    __slots__ = ("_fingerprint", "accounts", "sketch")

    def __init__(
        self, fingerprints: Fingerprints, path: str, body: bytes, accounts: tuple[str, ...]
    ) -> None:
        self.sketch, self.accounts = fingerprints.sketch(path, body), accounts
        self._fingerprint: str | asyncio.Future[str]
        if len(body) <= _INLINE:
            self._fingerprint = fingerprints.of(path, body)
        else:
            loop = asyncio.get_running_loop()
            self._fingerprint = loop.run_in_executor(None, fingerprints.of, path, body)

    def equals(self, other: RequestIdentity) -> bool:
        """Whether both are known to be of equal requests: not while a fingerprint is being made."""
        if self.sketch != other.sketch:
            return False
        mine = self._known
        return mine is not None and mine == other._known

    @property
    def _known(self) -> str | None:
        """The fingerprint, if it is known."""
        found = self._fingerprint
        if isinstance(found, str):
            return found
        return found.result() if found.done() and not found.cancelled() else None

    async def fingerprint(self) -> str:
        """The fingerprint, once it is known."""
        if not isinstance(self._fingerprint, str):
            # Shielded: others may wait for it too.
            self._fingerprint = await asyncio.shield(self._fingerprint)
        return self._fingerprint


class Departure(NamedTuple):
    """A request whose client went away before its answer, or in the middle of it: ``begun``.

    ``at``: when. ``alone``: the engine had nothing else, and ``arrivals`` requests had come to it.
    """

    at: float
    identity: RequestIdentity
    alone: bool
    arrivals: int
    begun: bool
