"""Asks `suspects` about each request on its way, and tells it what became of the request."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from secrets import token_bytes
from typing import TYPE_CHECKING, Final

from turbofit.core.process.log import LazyLogger
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.quarantine.accounts import BUDGET, BUDGET_SECONDS, accounts_of
from turbofit.gateway.quarantine.fingerprints import KEY_BYTES, Fingerprints
from turbofit.gateway.quarantine.identity import Departure, RequestIdentity
from turbofit.gateway.quarantine.quarantine_file import QuarantineFile, installation_key, kept_time
from turbofit.gateway.quarantine.quarantined import Accused, Conviction
from turbofit.gateway.quarantine.suspects import Suspects

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.gateway.quarantine.quarantined import EngineDeath
    from turbofit.gateway.routing.engines import RoutedEngine
    from turbofit.gateway.routing.request_context import RequestContext

__all__ = ["Quarantine", "now", "open_quarantine"]

_LOG: Final = LazyLogger(__name__)

#: What a full disk did not take is written again after so many.
_AGAIN_SECONDS: Final = 15.0


class Quarantine:
    """The gateway's side of `suspects`.

    Args:
        suspects: what is known.
        fingerprints: of this installation.
        file: keeps what is known; None where nothing is kept.
        clock: seconds that only grow.
        count: counts for the metrics page.
    """

    def __init__(
        self,
        suspects: Suspects,
        fingerprints: Fingerprints,
        file: QuarantineFile | None,
        clock: Callable[[], float],
        count: Callable[..., None],
    ) -> None:
        self.suspects, self._clock = suspects, clock
        self._fingerprints, self._file, self._count = fingerprints, file, count
        self._keeping: asyncio.Task[None] | None = None
        self._accusing: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._stale = False

    def check_client(self, request: RequestContext) -> None:
        """Refuse who has cost too many engines.

        Raises:
            Refusal: 429 until enough of its deaths are an hour old.
        """
        accounts = accounts_of(request.key, request.address)
        seconds = self.suspects.accounts.seconds_refused(accounts)
        if seconds and self._read_again():
            seconds = self.suspects.accounts.seconds_refused(accounts)
        if seconds:
            name = next(one for one in accounts if self.suspects.accounts.seconds_refused((one,)))
            raise Refusal(
                429,
                "too_many_deaths",
                f"inference engines ended at requests of this client, {BUDGET} or more within "
                f"{BUDGET_SECONDS / 3600:g} h: its requests are refused for {seconds} s. Whoever "
                f"runs the server can let it in again with `turbofit watch --forget '{name}'`",
                retry_after=seconds,
            )

    def identify(self, request: RequestContext) -> None:
        """Give the request its identity."""
        assert request.route is not None
        if not request.body:
            return
        accounts = accounts_of(request.key, request.address)
        path, body = request.route.path, request.body
        request.identity = RequestIdentity(self._fingerprints, path, body, accounts)

    def refuse_convicted(self, fingerprint: str) -> None:
        """Refuse a request that has ended engines before.

        Raises:
            Refusal: 422.
        """
        conviction = self.suspects.conviction(fingerprint)
        if conviction is not None and self._read_again():
            conviction = self.suspects.conviction(fingerprint)
        if conviction is not None:
            raise _convicted(conviction)

    async def convicts(self, request: RequestContext) -> bool:
        """Whether a request is convicted."""
        identity = request.identity
        if identity is None:
            return False
        return self.suspects.conviction(await identity.fingerprint()) is not None

    def _read_again(self) -> bool:
        """Look whether somebody has pardoned anything, or found more; whether it may be so."""
        changed = self._file is not None and self._file.changed
        if changed and self._file is not None:
            self.suspects.merge(self._file.read())
        return changed

    async def suspected(self, request: RequestContext, *, again: bool) -> str | None:
        """The fingerprint of a request that runs only alone; None where it is no suspect.

        Args:
            request: the request.
            again: an engine has just died with it: it is one, whoever was convicted meanwhile.

        Raises:
            Refusal: 422 where it is convicted.
        """
        identity = request.identity
        if identity is None or not (again or self.suspects.knows(identity.sketch)):
            return None
        fingerprint = await identity.fingerprint()
        self.refuse_convicted(fingerprint)
        suspicion = self.suspects.suspicion(fingerprint)
        return fingerprint if again or suspicion is not None else None

    def runs_to_end(self, fingerprint: str) -> bool:
        """Whether its answer must end, not only begin, before others come to its engine.

        Of one whose client left nobody knows whether its answer would have begun.
        """
        found = self.suspects.suspicion(fingerprint)
        return found is not None and (found.begun or found.left)

    async def ended(self, request: RequestContext) -> None:
        """An engine has answered a request, or died, or was given up, while it had it."""
        outcome, identity, engine = request.outcome, request.identity, request.engine
        if outcome is None or identity is None or engine is None:
            return
        if outcome.death is not None:
            new = not outcome.death.accused
            fingerprint = await identity.fingerprint()
            accused = Accused(
                fingerprint=fingerprint,
                sketch=identity.sketch,
                accounts=identity.accounts,
                alone=outcome.alone,
                equal_beside=outcome.equal_beside > 0,
                begun=outcome.answered,
            )
            self._accuse(outcome.death, accused)
            if new:
                self._count("engine_deaths_total", f"engine={engine.label}")
                await self._accuse_left(engine)
            self.keep()
        elif not outcome.broken and not outcome.failed:
            engine.arrivals_answered = max(engine.arrivals_answered, outcome.arrivals)
            fingerprint = ""
            if self.suspects.knows(identity.sketch):
                fingerprint = await identity.fingerprint()
            accounts = identity.accounts if outcome.status == 200 else ()
            if self.suspects.acquit(fingerprint, accounts):
                self.keep()

    def left(self, request: RequestContext) -> None:
        """The client of a request went away while an engine had it."""
        if request.identity is not None and request.engine is not None:
            engine = request.engine
            begun = request.outcome is not None and request.outcome.answered
            alone, at = not engine.outstanding, self._clock()
            left = Departure(at, request.identity, alone, engine.arrivals, begun)
            engine.left.append(left)

    def engine_ended(self, engine: RoutedEngine, *, other_cause: bool) -> None:
        """A supervisor saw the engine's process end.

        Args:
            engine: which.
            other_cause: somebody killed it, its GPU is lost, or others took its memory: its
                requests did not end it.
        """
        death = engine.note_end()
        if other_cause:
            self.suspects.absolve(death)
            # Who left before it is no more accused of the next process's death than who was there.
            engine.left.clear()
            engine.failed_at = float("inf")
            self.keep()
        elif not death.accused:
            self._accusing = asyncio.ensure_future(self._accuse_left(engine))

    async def unreachable(self, engine: RoutedEngine) -> None:
        """Nothing listens at an engine: it has ended, as its supervisor may see only later."""
        if engine.left:
            engine.note_death(engine.left[-1].at)
            await self._accuse_left(engine)

    async def _accuse_left(self, engine: RoutedEngine) -> None:
        """Accuse those too whose clients left shortly before the first sign of the engine's death.

        A supervisor sees the end late where a slow disk keeps it waiting. The last one that left
        was alone there where nothing came after it, and the engine had answered requests that came
        after all others had left. So was one that had nothing beside it until it left, for the
        second time before a death: an engine may take others again before it ends of it.
        """
        death, recent = engine.death, engine.left_lately()
        last = recent[-1] if recent else None
        alone = (
            last is not None
            and last.alone
            and last.arrivals == engine.arrivals
            and not engine.may_have_another(last.identity.sketch)
        )
        engine.left.clear()
        told_of = set()
        # The last one first: of equal ones the first counts.
        for one in reversed(recent) if death is not None else ():
            fingerprint, left = await one.identity.fingerprint(), not one.begun
            if fingerprint in told_of:
                continue
            told_of.add(fingerprint)
            before = self.suspects.suspicion(fingerprint)
            again = before is not None and before.left and left and one.alone
            accused = Accused(
                fingerprint=fingerprint,
                sketch=one.identity.sketch,
                accounts=one.identity.accounts,
                alone=again or (alone and one is last),
                begun=one.begun,
                left=left,
            )
            assert death is not None
            self._accuse(death, accused)
        if recent:
            self.keep()

    def _accuse(self, death: EngineDeath, accused: Accused) -> None:
        if self.suspects.accuse(death, accused) is not None:
            self._count("convicted_total")
            _LOG.info("a request is convicted: %s", accused.fingerprint)

    def keep(self) -> None:
        """Write down what is known, soon, and not twice at once; again while a disk is full."""
        self._stale = True
        if self._file is not None and (self._keeping is None or self._keeping.done()):
            self._keeping = asyncio.ensure_future(self._keep())

    def keep_unwritten(self) -> None:
        """Write what a full disk did not take."""
        if self._file is not None and self._file.unwritten:
            self.keep()

    def take_over(self, before: Quarantine) -> None:
        """Learn what an earlier gateway could not write to the same file: the disk was full."""
        mine, other = self._file, before._file
        if mine is not None and other is not None and other.unwritten and mine.path == other.path:
            self.suspects.merge(before.suspects.state())
            mine.unwritten = True

    async def _keep(self) -> None:
        assert self._file is not None
        loop = asyncio.get_running_loop()
        while self._stale:
            self._stale = False
            others = await loop.run_in_executor(None, self._file.write, self.suspects.state())
            if others is not None:
                self.suspects.merge(others)
        if self._again is not None:
            self._again.cancel()
        if self._file.unwritten:
            self._again = loop.call_later(_AGAIN_SECONDS, self.keep)

    async def close(self) -> None:
        """Wait until everything is written; what a full disk did not take is tried once more."""
        if self._accusing is not None:
            await self._accusing
        self.keep_unwritten()
        if self._keeping is not None:
            await self._keeping
        if self._again is not None:
            self._again.cancel()


def open_quarantine(file: str | None, count: Callable[..., None]) -> Quarantine:
    """What a file keeps, or an empty one that nothing is kept of."""
    if file is None:
        key = token_bytes(KEY_BYTES)
        return Quarantine(Suspects(kept_time), Fingerprints(key), None, now, count)
    kept = QuarantineFile(Path(file), kept_time)
    suspects = Suspects(kept_time, kept.read().none_ahead(kept_time()))
    return Quarantine(suspects, Fingerprints(installation_key()), kept, now, count)


def now() -> float:
    """Seconds that only grow."""
    return time.monotonic()


def _convicted(conviction: Conviction) -> Refusal:
    def said(at: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at))

    return Refusal(
        422,
        "convicted",
        f"{conviction.engines} inference engines ended while they had this request, the last at "
        f"{said(conviction.since)} while it had no other but equal ones: it is refused until "
        f"{said(conviction.until)}. Whoever runs the server can let it in again with `turbofit "
        f"watch --forget {conviction.fingerprint}`",
    )
